"""Scripts shaped like torch-rechub's examples, in our words; the package they import from is their only parameter.

Each reads small CSV files from ``./data`` of its working directory, takes ``--model_name`` and prints the test scores.
"""

import math
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

import fastmtl

HEADER = """
import argparse
import pandas as pd
import torch
from {package}.basic.features import DenseFeature, SparseFeature
from {package}.models.multi_task import AITM, ESMM, MMOE, PLE, SharedBottom
from {package}.trainers import MTLTrainer
from {package}.utils.data import DataGenerator

parser = argparse.ArgumentParser()
parser.add_argument("--model_name", default="SharedBottom")
parser.add_argument("--epoch", type=int, default=2)
parser.add_argument("--save_dir", default="./")
parser.add_argument("--seed", type=int, default=2022)
args = parser.parse_args()
name = args.model_name
torch.manual_seed(args.seed)
train, val, test = (pd.read_csv(f"data/{{part}}.csv") for part in ("train", "val", "test"))
everything = pd.concat([train, val, test], axis=0).fillna(0)
ends = len(train), len(train) + len(val)


def cut(columns):
    return [{{c: everything[c].values[a:b] for c in columns}} for a, b in zip((0, *ends), (*ends, None))]


def labels(columns):
    return [everything[columns].values[a:b] for a, b in zip((0, *ends), (*ends, None))]
"""

FOOTER = """
(x_train, x_val, x_test), (y_train, y_val, y_test) = cut(columns), labels(label_columns)
loaders = DataGenerator(x_train, y_train).generate_dataloader(
    x_val=x_val, y_val=y_val, x_test=x_test, y_test=y_test, batch_size=batch_size)
trainer = MTLTrainer(
    model,
    task_types=task_types,
    optimizer_params={{"lr": 1e-3, "weight_decay": 1e-4}},
    n_epoch=args.epoch,
    earlystop_patience=30,
    device="cpu",
    model_path=args.save_dir,
    **extra)
trainer.fit(loaders[0], loaders[1])
auc = trainer.evaluate(trainer.model, loaders[2])
print(f"test auc: {{auc}}")
"""

#: Census and Ali-CCP: a frame with two labels renamed, ESMM on the sparse columns alone.
WITH_ESMM = (
    HEADER
    + """
everything = everything.rename(columns={{"first": "cvr_label", "second": "ctr_label"}})
everything["ctcvr_label"] = everything["cvr_label"] * everything["ctr_label"]
dense = [c for c in everything.columns if c.startswith("D") or c == "age"]
sparse = [c for c in everything.columns if c not in dense and not c.endswith("_label")]
batch_size, extra = 128, {extra}
if name == "ESMM":
    columns, label_columns = sparse, ["cvr_label", "ctr_label", "ctcvr_label"]
    task_types = ["classification"] * 3
    user = [SparseFeature(c, everything[c].max() + 1, embed_dim=16) for c in sparse[:3]]
    item = [SparseFeature(c, everything[c].max() + 1, embed_dim=16) for c in sparse[3:]]
    model = ESMM(user, item, cvr_params={{"dims": [16, 8]}}, ctr_params={{"dims": [16, 8]}})
else:
    columns, label_columns = sparse + dense, ["cvr_label", "ctr_label"]
    task_types = ["classification", "classification"]
    features = [SparseFeature(c, everything[c].max() + 1, embed_dim=4) for c in sparse] \\
        + [DenseFeature(c) for c in dense]
    towers = [{{"dims": [8]}}, {{"dims": [8]}}]
    if name == "SharedBottom":
        model = SharedBottom(features, task_types, bottom_params={{"dims": [117]}}, tower_params_list=towers)
    elif name == "MMOE":
        model = MMOE(features, task_types, 8, expert_params={{"dims": [16]}}, tower_params_list=towers)
    elif name == "PLE":
        model = PLE(features, task_types, n_level=1, n_expert_specific=2, n_expert_shared=1,
                    expert_params={{"dims": [16]}}, tower_params_list=towers)
    elif name == "AITM":
        model = AITM(features, 2, bottom_params={{"dims": [32, 16]}}, tower_params_list=towers)
"""
    + FOOTER
)

#: AliExpress: three layers, and "output_layer": False among the PLE experts' parameters (torch-rechub: TypeError).
ALIEXPRESS = (
    HEADER
    + """
sparse = [c for c in everything.columns if c.startswith("categorical")]
dense = [c for c in everything.columns if c.startswith("numerical")]
columns, label_columns, batch_size, extra = sparse + dense, ["conversion", "click"], 10240, {extra}
task_types = ["classification", "classification"]
features = [SparseFeature(c, everything[c].max() + 1, embed_dim=5) for c in sparse] + [DenseFeature(c) for c in dense]
towers = [{{"dims": [8]}}, {{"dims": [8]}}]
if name == "SharedBottom":
    model = SharedBottom(features, task_types, bottom_params={{"dims": [192, 96, 48]}}, tower_params_list=towers)
elif name == "MMOE":
    model = MMOE(features, task_types, n_expert=3, expert_params={{"dims": [64, 32, 16]}}, tower_params_list=towers)
elif name == "PLE":
    model = PLE(features, task_types, n_level=1, n_expert_specific=1, n_expert_shared=1,
                expert_params={{"dims": [64, 32, 16], "output_layer": False}}, tower_params_list=towers)
elif name == "AITM":
    model = AITM(features, n_task=2, bottom_params={{"dims": [128, 64, 32]}}, tower_params_list=towers)
"""
    + FOOTER
)


def _census(rng, n):
    frame = pd.DataFrame({"age": rng.random(n)})
    for name, vocabulary in (("industry code", 50), ("race", 5), ("sex", 2), ("education", 17), ("year", 2)):
        frame[name] = rng.integers(0, vocabulary, n)
    frame["first"] = (frame["age"] + 0.1 * frame["education"] + rng.normal(0, 0.5, n) > 1.6).astype(int)
    frame["second"] = (frame["age"] + rng.normal(0, 0.3, n) < 0.5).astype(int)
    return frame


def _ali_ccp(rng, n):
    frame = pd.DataFrame(
        {name: rng.integers(0, v, n) for name, v in (("101", 90), ("121", 12), ("122", 9), ("205", 70))}
    )
    frame[["D109_14", "D508"]] = rng.random((n, 2))
    frame["second"] = (frame["D508"] + rng.normal(0, 0.3, n) > 0.7).astype(int)
    frame["first"] = frame["second"] * (frame["D109_14"] + rng.normal(0, 0.3, n) > 0.5).astype(int)
    return frame


def _aliexpress(rng, n):
    frame = pd.DataFrame({f"categorical_{i}": rng.integers(0, v, n) for i, v in enumerate((12, 3, 40), start=1)})
    for i in range(1, 6):
        frame[f"numerical_{i}"] = rng.random(n)
    frame["click"] = (frame["numerical_1"] + rng.normal(0, 0.2, n) > 0.6).astype(int)
    frame["conversion"] = frame["click"] * (frame["numerical_2"] > 0.5).astype(int)
    return frame


#: script -> (text, its frames, what is passed on to the trainer, models).
ALL = ("SharedBottom", "MMOE", "PLE", "AITM")
SCRIPTS = {
    "census": (WITH_ESMM, _census, "{}", (*ALL, "ESMM")),
    "ali_ccp": (WITH_ESMM, _ali_ccp, "{}", (*ALL, "ESMM")),
    "aliexpress": (ALIEXPRESS, _aliexpress, "{}", ALL),
    "gradnorm": (ALIEXPRESS, _aliexpress, '{"adaptive_params": {"method": "gradnorm"}}', ALL),
    "metabalance": (ALIEXPRESS, _aliexpress, '{"adaptive_params": {"method": "metabalance"}}', ALL),
    "uwl": (WITH_ESMM, _census, '{"adaptive_params": {"method": "uwl"}}', (*ALL, "ESMM")),
}


def _prepare(script, folder, package="fastmtl"):
    """Write the script and its data; returns the script's path."""
    text, frame, extra, _ = SCRIPTS[script]
    rng = np.random.default_rng(1)
    (folder / "data").mkdir()
    for part, n in (("train", 600), ("val", 200), ("test", 200)):
        frame(rng, n).to_csv(folder / "data" / f"{part}.csv", index=False)
    path = folder / f"run_{script}.py"
    path.write_text(text.format(package=package, extra=extra))
    return path


def _scores(printed):
    (line,) = re.findall(r"^test auc: \[(.*)\]$", printed, flags=re.M)
    return [float(re.sub(r"^np\.float64\((.*)\)$", r"\1", score.strip())) for score in line.split(",")]


@pytest.mark.parametrize(("script", "name"), [(s, name) for s, (*_, names) in SCRIPTS.items() for name in names])
def test_script_runs_with_the_import_replaced(script, name, tmp_path, monkeypatch, capsys):
    path = _prepare(script, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path.name, "--model_name", name])
    exec(compile(path.read_text(), str(path), "exec"), {"__name__": "__main__"})
    scores = _scores(capsys.readouterr().out)
    assert len(scores) == (3 if name == "ESMM" else 2)
    assert all(0 <= score <= 1 for score in scores)
    assert (tmp_path / "model_base_0.pth").exists()


def test_script_runs_as_a_process_of_its_own(tmp_path):
    """As a user starts it: exit code 0 and a quiet stdout but for what the script prints."""
    path = _prepare("census", tmp_path)
    root = os.path.dirname(os.path.dirname(fastmtl.__file__))
    done = subprocess.run(
        [sys.executable, path.name, "--model_name", "MMOE", "--epoch", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert len(_scores(done.stdout)) == 2


@pytest.mark.parametrize(("script", "name"), [("census", "MMOE"), ("ali_ccp", "AITM"), ("aliexpress", "SharedBottom")])
def test_script_gives_torch_rechubs_scores(script, name, tmp_path, monkeypatch, capsys):
    """Same seed, same data, same scores, to what a bias that drifts in front of a BatchNorm does to ranks."""
    pytest.importorskip("torch_rechub", reason="torch-rechub is not here: nothing to compare with")
    path = _prepare(script, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path.name, "--model_name", name, "--epoch", "1"])
    scores = []
    for package in ("torch_rechub", "fastmtl"):
        code = path.read_text().replace("fastmtl", package)
        exec(compile(code, str(path), "exec"), {"__name__": "__main__"})
        scores.append(_scores(capsys.readouterr().out))
    assert all(math.isfinite(score) for score in scores[0])
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-2)
