"""What the documents say is there: their examples run, and what they name exists."""

import re
import tomllib

import numpy as np
import pandas as pd
import pytest
import torch

from fastmtl import backend
from fastmtl.cli.keys import WEIGHTINGS
from fastmtl.trainers import MTLTrainer
from fastmtl.utils import DataGenerator
from fastmtl.weighting import STRATEGIES

from . import documents
from .documents import DOCUMENTS
from .layers import RANKS, ROOT, modules

EXAMPLES = documents.code_blocks(ROOT / "README.md", "python")


@pytest.fixture
def log(tmp_path, monkeypatch):
    """A folder to work in, with a small log.csv whose labels depend on its columns."""
    rng = np.random.default_rng(0)
    user, item, price = rng.integers(0, 30, 4000), rng.integers(0, 50, 4000), rng.random(4000).round(3)
    click = rng.random(4000) < 0.2 + 0.6 * (user % 2)
    purchase = click & (rng.random(4000) < 0.2 + 0.6 * price)
    columns = {"user": user, "item": item, "price": price, "click": click.astype(int), "purchase": purchase.astype(int)}
    pd.DataFrame(columns).to_csv(tmp_path / "log.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return columns


def test_the_readme_has_an_example_of_each_dialect():
    assert len(EXAMPLES) == 2
    assert all(len(example.splitlines()) <= 16 for example in EXAMPLES)


@pytest.mark.parametrize("package", ["fastmtl", "torch_rechub"])
def test_the_librarys_example_runs_under_either_name(package, log, capsys):
    torch.manual_seed(0)
    exec(EXAMPLES[0].replace("fastmtl", package), {})
    scores = [float(score) for score in re.findall(r"0\.\d+", capsys.readouterr().out.strip().splitlines()[-1])]
    assert len(scores) == 2
    assert all(0.5 < score < 1 for score in scores)


def test_the_tutorials_example_runs(log, capsys):
    torch.manual_seed(0)
    exec(EXAMPLES[1], {})
    lines = capsys.readouterr().out.strip().splitlines()
    found = [re.fullmatch(r"(\w+): AUC (0\.\d{4}), log loss (\d\.\d{4})", line).groups() for line in lines]
    assert [task for task, _, _ in found] == ["click", "purchase"]
    assert all(float(auc) > 0.5 for _, auc, _ in found)


def test_the_strategy_of_the_contributing_guide_trains(log, tmp_path, monkeypatch):
    (source,) = documents.code_blocks(ROOT / "CONTRIBUTING.md", "python")
    scope = {"__package__": "fastmtl.weighting", "__name__": "fastmtl.weighting.random_weights"}
    exec(source, scope)
    monkeypatch.setitem(STRATEGIES, "random", scope["RandomWeights"])
    from fastmtl.models import SharedBottom

    torch.manual_seed(0)
    x = {name: log[name] for name in ("user", "item", "price")}
    y = {name: log[name] for name in ("click", "purchase")}
    train, val, _ = DataGenerator(x, y).generate_dataloader(split_ratio=[0.7, 0.3], batch_size=256)
    model = SharedBottom(features=list(x), hidden_units=[16], task_hidden_units=[8], num_tasks=2)
    history = MTLTrainer(model, adaptive_params={"method": "random"}, n_epoch=3, progress=False).fit(train, val)
    assert history[-1][0] < history[0][0]


def test_the_lookup_with_weights_of_ids_runs():
    (source,) = documents.code_blocks(ROOT / "docs/architecture.md", "python")
    scope = {}
    exec(source, scope)
    right = (scope["scales"].double()[:, :, None] * scope["table"].detach().double()[scope["ids"]]).sum(1)
    torch.testing.assert_close(scope["pooled"].detach().double(), right, rtol=1e-5, atol=1e-5)


def test_the_command_line_offers_every_strategy():
    assert {*WEIGHTINGS, "static"} == set(STRATEGIES)


@pytest.mark.parametrize("path", DOCUMENTS, ids=documents.name)
def test_links_lead_somewhere(path):
    assert [target for target in documents.links(path) if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=documents.name)
def test_named_paths_exist(path):
    assert [named for named in documents.paths(path) if not (ROOT / named).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=documents.name)
def test_make_targets_exist(path):
    known = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert documents.make_targets(path) <= set(known)


def test_the_layers_of_the_architecture_page_are_those_that_are_tested():
    text = (ROOT / "docs" / "architecture.md").read_text()
    (drawn,) = re.findall(r"^```\n(cli\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"\(.*\)", "", line).split() for line in drawn.splitlines()]
    ranks = [{RANKS[layer] for layer in line} for line in lines]
    assert all(len(rank) == 1 for rank in ranks)
    order = [rank.pop() for rank in ranks]
    assert order == sorted(order, reverse=True)
    assert {layer for line in lines for layer in line} == set(RANKS) - {"__main__", "__init__"}


def test_the_architecture_page_shows_the_backends_table():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for op, backends in backend.TABLE.items():
        assert re.search(rf"^\| `{op}` \|", text, re.MULTILINE)
        assert set(backends) == set(backend.PREFERENCE)
    assert f"| op | {' | '.join(f'`{name}`' for name in backend.PREFERENCE)} |" in text


@pytest.mark.parametrize(("op", "backends"), backend.TABLE.items())
def test_backends_have_what_the_contributing_guide_asks_for(op, backends):
    for module in backends.values():
        assert callable(module.unavailable)
        assert callable(module.unsupported)
        functions = [op] if module.DIFFERENTIABLE else [f"{op}_fwd", f"{op}_bwd"]
        assert all(callable(getattr(module, function)) for function in functions)


def test_every_extra_that_a_message_names_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {extra for path in modules() for extra in re.findall(r"fastmtl\[(\w+)\]", path.read_text())}
    for path in modules():
        named |= set(re.findall(r"""\brequire\(\s*"[\w.]+",\s*"(\w+)",""", path.read_text()))
    assert {"gpu", "onnx", "parquet", "plot"} <= named
    assert named <= set(project["optional-dependencies"])
