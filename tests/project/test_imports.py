"""Imports go downward only, torch-rechub stays outside, and files stay short."""

import pytest

from .layers import PACKAGE, RANKS, ROOT, dotted, layer, modules, violations

LONGEST_FILE = 500  # lines


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downward(path):
    assert violations(path.read_text(), path) == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_has_a_layer(path):
    assert layer(dotted(path)[0]) in RANKS


@pytest.mark.parametrize(
    ("where", "source", "line"),
    [
        ("basic/layers.py", "from ..models import MMOE", 1),
        ("basic/layers.py", "from .. import models", 1),
        ("basic/layers.py", "import torch\nimport fastmtl.trainers", 2),
        ("basic/layers.py", "def f():\n    from ..models.multi_task import PLE", 2),
        (
            "ops/embedding_bag.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..basic import batch",
            3,
        ),
        ("weighting/uwl.py", "from ..models.multi_task.base import MTLModel", 1),
        ("data/census.py", "from fastmtl.weighting import Mean", 1),
        ("models/multi_task/ple.py", "import importlib\nimportlib.import_module('fastmtl.trainers')", 2),
        ("models/multi_task/ple.py", "from ... import __version__", 1),
        ("spec.py", "from .errors import FastMTLError", 1),
        ("utils/data.py", "from torch_rechub.utils.data import DataGenerator", 1),
        ("cli/train.py", "import torch_rechub", 1),
    ],
)
def test_the_rule_would_notice(where, source, line):
    (found,) = violations(source, PACKAGE / where)
    assert found.startswith(f"fastmtl/{where}:{line}: ")


@pytest.mark.parametrize(
    ("where", "source"),
    [
        (
            "models/multi_task/ple.py",
            "from ...basic.bank import ExpertGate\nfrom .base import MTLModel\nfrom ... import ops",
        ),
        ("trainers/mtl_trainer.py", "def f():\n    from ..utils.onnx_export import export_onnx"),
        ("cli/__init__.py", "from .. import __version__\nfrom ..trainers import MTLTrainer"),
    ],
)
def test_the_rule_lets_pass_what_goes_downward(where, source):
    assert violations(source, PACKAGE / where) == []


def test_files_are_short():
    sources = [*modules(), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {path: n for path, n in lengths.items() if n > LONGEST_FILE} == {}
