"""The picture of a model."""

import shutil

import pytest

from fastmtl.basic.features import DenseFeature, SparseFeature
from fastmtl.errors import MissingExtraError
from fastmtl.models import MMOE
from fastmtl.trainers import MTLTrainer


@pytest.fixture
def trainer(tmp_path):
    pytest.importorskip("torchview", reason="torchview is not installed: 'fastmtl[visualization]'")
    features = [SparseFeature("a", 10, 4), DenseFeature("d")]
    model = MMOE(features, ["classification"] * 2, 3, {"dims": [6]}, [{"dims": [4]}] * 2)
    return MTLTrainer(model, model_path=str(tmp_path))


def test_graph_names_the_parts(trainer):
    graph = trainer.visualization(depth=2, dpi=120)
    source = graph.visual_graph.source
    assert all(part in source for part in ("EmbeddingLayer", "ExpertGate", "TowerBank"))
    assert graph.visual_graph.graph_attr["dpi"] == "120"


def test_saving_needs_graphviz(trainer, tmp_path):
    path = tmp_path / "pictures" / "model.svg"
    if shutil.which("dot"):
        trainer.visualization(save_path=str(path))
        assert path.read_text().count("<svg") == 1
    else:
        with pytest.raises(MissingExtraError, match="'dot' is not on the PATH"):
            trainer.visualization(save_path=str(path))
