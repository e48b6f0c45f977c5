"""The multi-task tutorial runs as written, given a frame with its columns.

The text is not ours, so TUTORIAL repeats its code statement by statement. Where the text itself is at hand
(FASTMTL_TUTORIAL, or tutorial.md beside the data folder), its code blocks run too.
"""

import ast
import contextlib
import io
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fastmtl.trainers import MTLTrainer
from fastmtl.utils import DataGenerator

USER = ["user_id", "age", "gender", "occupation"]
ITEM = ["item_id", "category_id", "shop_id", "brand_id"]
VOCABULARIES = [40, 7, 2, 12, 60, 9, 15, 20]

#: The parts between the tutorial's headlines, in order, with its package replaced by ours.
TUTORIAL = {
    "data": """
import pandas as pd
import numpy as np
from fastmtl.utils import DataGenerator
from fastmtl.models import *
from fastmtl.trainers import *

df = pd.read_csv("ali_ccp_data.csv")
user_features = ['user_id', 'age', 'gender', 'occupation']
item_features = ['item_id', 'category_id', 'shop_id', 'brand_id']
features = user_features + item_features
tasks = ['click', 'conversion']
""",
    "SharedBottom": """
model = SharedBottom(
    features=features,
    hidden_units=[256, 128],
    task_hidden_units=[64, 32],
    num_tasks=2,
    task_types=['binary', 'binary'])
trainer = MTLTrainer(
    model=model,
    optimizer_params={'lr': 0.001},
    n_epochs=10)
trainer.fit(train_dataloader, val_dataloader)
""",
    "ESMM": """
model = ESMM(
    features=features,
    hidden_units=[256, 128, 64],
    tower_units=[32, 16],
    embedding_dim=16)
trainer = MTLTrainer(
    model=model,
    optimizer_params={'lr': 0.001},
    n_epochs=10)
""",
    "MMoE": """
model = MMoE(
    features=features,
    expert_units=[256, 128],
    num_experts=8,
    num_tasks=2,
    expert_activation='relu',
    gate_activation='softmax')
trainer = MTLTrainer(
    model=model,
    optimizer_params={'lr': 0.001},
    n_epochs=10)
""",
    "PLE": """
model = PLE(
    features=features,
    expert_units=[256, 128],
    num_experts=4,
    num_layers=3,
    num_shared_experts=2,
    task_types=['binary', 'binary'])
trainer = MTLTrainer(
    model=model,
    optimizer_params={'lr': 0.001},
    n_epochs=10)
""",
    "GradNorm": """
trainer = MTLTrainer(
    model=model,
    optimizer_params={'lr': 0.001},
    task_weights_strategy='gradnorm',
    gradnorm_alpha=1.5)
""",
    "MetaBalance": """
from fastmtl.utils import MetaBalance
optimizer = MetaBalance(
    model.parameters(),
    relax_factor=0.7,
    beta=0.9)
trainer = MTLTrainer(
    model=model,
    optimizer=optimizer)
""",
    "evaluation": """
results = evaluate_multi_task(model, test_dataloader)
for task, metrics in results.items():
    print(f"Task: {task}")
    print(f"AUC: {metrics['auc']:.4f}")
    print(f"LogLoss: {metrics['logloss']:.4f}")
""",
    "task weights": """
trainer = MTLTrainer(
    model=model,
    task_weights=[1.0, 0.5])
""",
    "layers": """
from fastmtl.utils import shared_task_layers
shared_params, task_params = shared_task_layers(model)
""",
    "learning rates": """
trainer = MTLTrainer(
    model=model,
    task_specific_lr={'click': 0.001, 'conversion': 0.0005})
""",
}
TRAINED = [part for part, code in TUTORIAL.items() if "MTLTrainer(" in code]


def _frame(n=400):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({name: rng.integers(0, v, n) for name, v in zip(USER + ITEM, VOCABULARIES, strict=True)})
    frame["click"] = (frame["age"] + rng.normal(0, 2, n) > 3).astype(int)
    frame["conversion"] = frame["click"] * (frame["category_id"] + rng.normal(0, 2, n) > 4).astype(int)
    return frame


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """The tutorial's working directory with its CSV, and the loaders that it leaves to the reader."""
    frame = _frame()
    frame.to_csv(tmp_path / "ali_ccp_data.csv", index=False)
    monkeypatch.chdir(tmp_path)
    generator = DataGenerator(frame[USER + ITEM], frame[["click", "conversion"]])
    train, val, test = generator.generate_dataloader(split_ratio=[0.7, 0.1], batch_size=64)
    return {"train_dataloader": train, "val_dataloader": val, "test_dataloader": test}


def _run(code, namespace, n_epoch=1):
    """Execute a part, then really fit the trainer it made, for one epoch."""
    namespace.pop("trainer", None)
    # The part's own fit runs its ten epochs as written; the fit added here is short.
    exec(compile(code, "tutorial", "exec"), namespace)
    trainer = namespace.get("trainer")
    if trainer is None:
        return None
    assert isinstance(trainer, MTLTrainer)
    trainer.n_epoch = n_epoch
    return np.array(trainer.fit(namespace["train_dataloader"], namespace["val_dataloader"], mode="again"))


def test_the_tutorial_runs_from_top_to_bottom(cpu_backend, namespace):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for part, code in TUTORIAL.items():
            log = _run(code, namespace)
            assert (log is not None) == (part in TRAINED), part
            if log is not None:
                assert np.isfinite(log).all(), part
                assert log.shape == (1, 2 * namespace["model"].n_task), part
    assert list(namespace["results"]) == ["click", "conversion"]
    for metrics in namespace["results"].values():
        assert 0 <= metrics["auc"] <= 1
        assert metrics["logloss"] > 0
    lines = printed.getvalue().splitlines()
    assert [line for line in lines if line.startswith("Task: ")] == ["Task: click", "Task: conversion"]
    assert sum(bool(re.fullmatch(r"(AUC|LogLoss): \d\.\d{4}", line)) for line in lines) == 4
    assert len(namespace["shared_params"]) > 0
    assert len(namespace["task_params"]) > 0
    assert (Path.cwd() / "model_base_0.pth").exists()


@pytest.mark.parametrize("part", ["SharedBottom", "ESMM", "MMoE", "PLE"])
def test_models_are_as_the_keywords_say(part, namespace):
    _run(TUTORIAL["data"], namespace)
    _run(TUTORIAL[part], namespace)
    shapes = {name: tuple(value.shape) for name, value in namespace["model"].state_dict().items()}
    for column, vocabulary in zip(USER + ITEM, VOCABULARIES, strict=True):
        assert shapes[f"embedding.embed_dict.{column}.weight"] == (vocabulary, 16)
    expected = {
        "SharedBottom": {
            "bottom_mlp.mlp.0.weight": (256, 128), "bottom_mlp.mlp.4.weight": (128, 256),
            "towers.0.mlp.0.weight": (64, 128), "towers.1.mlp.4.weight": (32, 64), "towers.1.mlp.8.weight": (1, 32),
        },
        "ESMM": {"tower_cvr.mlp.0.weight": (256, 128), "tower_ctr.mlp.8.weight": (64, 128)},
        "MMoE": {
            "experts.7.mlp.0.weight": (256, 128), "experts.0.mlp.4.weight": (128, 256),
            "gates.1.mlp.0.weight": (8, 128),
        },
        "PLE": {
            "cgc_layers.0.experts_specific.7.mlp.0.weight": (256, 128),
            "cgc_layers.2.experts_shared.1.mlp.4.weight": (128, 256),
            "cgc_layers.0.gates_specific.1.mlp.0.weight": (4 + 2, 128),
            "cgc_layers.1.gate_shared.mlp.0.weight": (2 * 4 + 2, 128),
        },
    }[part]  # fmt: skip
    assert {name: shapes.get(name) for name in expected} == expected
    absent = {"MMoE": "experts.8.", "PLE": "cgc_layers.3.", "SharedBottom": "towers.2.", "ESMM": "tower_ctcvr"}[part]
    assert not any(name.startswith(absent) for name in shapes)


def test_tasks_are_named_after_their_columns(namespace):
    _run(TUTORIAL["data"], namespace)
    _run(TUTORIAL["PLE"], namespace)
    assert namespace["model"].task_names == ["click", "conversion"]


def test_task_specific_learning_rates_move_the_towers_apart(namespace):
    """A task's own parameters move by its rate, everything else by the optimizer's."""
    _run(TUTORIAL["data"], namespace)
    _run(TUTORIAL["MMoE"], namespace)
    model, loader = namespace["model"], namespace["train_dataloader"]
    start = {name: value.clone() for name, value in model.state_dict().items()}
    one_batch = [next(iter(loader))]
    trainer = MTLTrainer(
        model=model,
        optimizer_params={"lr": 0.01},
        task_names=["click", "conversion"],
        task_specific_lr={"click": 0.1, "conversion": 0.001},
    )
    trainer.train_one_epoch(one_batch)
    moved = {
        name: float((value - start[name]).abs().max())
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    # Adam's first step is the learning rate, whatever the gradient's size.
    assert moved["towers.0.mlp.0.weight"] == pytest.approx(0.1, rel=1e-3)
    assert moved["towers.1.mlp.0.weight"] == pytest.approx(0.001, rel=1e-2)
    assert moved["experts.3.mlp.0.weight"] == pytest.approx(0.01, rel=1e-3)


def test_fixed_task_weights_scale_the_losses(namespace):
    """[1, 0.5]: the mean of the losses, the second one halved; so its tower gets half the gradient."""
    _run(TUTORIAL["data"], namespace)
    _run(TUTORIAL["MMoE"], namespace)
    model = namespace["model"]
    batch = next(iter(namespace["train_dataloader"]))
    gradients = []
    for weights in ([1.0, 1.0], [1.0, 0.5]):
        trainer = MTLTrainer(model=model, optimizer_params={"lr": 0.0}, task_weights=weights)
        trainer.train_one_epoch([batch])
        gradients.append({name: gradient.clone() for name, gradient in model.named_gradients()})
    for task, factor in ((0, 1.0), (1, 0.5)):
        name = f"towers.{task}.mlp.0.weight"
        np.testing.assert_allclose(gradients[1][name], factor * gradients[0][name], rtol=1e-4, atol=1e-8)


def _tutorial_file():
    """The tutorial's text, where this machine has it."""
    candidates = [os.environ.get("FASTMTL_TUTORIAL")]
    if os.environ.get("FASTMTL_DATA"):
        candidates.append(str(Path(os.environ["FASTMTL_DATA"]).resolve().parent / "tutorial.md"))
    return next((Path(path) for path in candidates if path and Path(path).is_file()), None)


def _code_of(text):
    """The tutorial's statements: its lines of Python, in order. The text has no fences; prose does not compile."""
    text = text.replace("torch_rechub", "fastmtl")
    fenced = re.findall(r"```(?:python)?\n(.*?)```", text, flags=re.S)
    if fenced:
        return fenced
    blocks, lines = [], text.splitlines()
    at = 0
    while at < len(lines):
        for end in range(len(lines), at, -1):
            candidate = "\n".join(lines[at:end])
            if _is_code(candidate):
                blocks.append(candidate)
                at = end
                break
        else:
            at += 1
    return blocks


def _is_code(text):
    if not re.match(r"(from|import|for|#)\s|\w+(, \w+)* = |\w+(\.\w+)*\(", text):
        return False
    try:
        statements = ast.parse(text).body
    except SyntaxError:
        return False
    # A headline of one word is an expression to Python.
    return not any(isinstance(one, ast.Expr) and isinstance(one.value, ast.Name) for one in statements)


TEXT = _tutorial_file()
if TEXT is not None:

    def test_the_text_at_hand_runs_as_written(namespace):
        blocks = _code_of(TEXT.read_text())
        assert "\n".join(blocks).count("MTLTrainer(") == len(TRAINED)
        for block in blocks:
            log = _run(block, namespace)
            assert (log is not None) == ("MTLTrainer(" in block)
