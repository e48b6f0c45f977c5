"""`fastmtl train`: what a run leaves behind, that it can be repeated, and what it says."""

import json

import numpy as np
import pytest
import torch
import yaml

import fastmtl
from fastmtl.cli import run_folder
from fastmtl.data import Encoder, load_census
from fastmtl.trainers import MTLTrainer, evaluate_multi_task

SMALL = ("synthetic", "--rows", 3000, "--epochs", 1, "--batch-size", 256)


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_the_run_folder_is_complete(run):
    names = {path.name for path in run.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "metrics.json", "curves.png", "best", "model_mmoe_1.pth"}
    assert {path.name for path in (run / "best").iterdir()} == {"config.json", "model.safetensors", "encoder.json"}
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert (settings["model"]["n_expert"], settings["train"]["epochs"], settings["train"]["lr"]) == (3, 3, 1e-3)


def test_metrics_jsonl_has_a_line_an_epoch_under_the_tasks_names(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert set(line) == {
            "epoch", "train/income/loss", "train/marital/loss", "valid/income/auc", "valid/marital/auc",
            "learning_rate", "samples_per_second",
        }  # fmt: skip
        assert line["learning_rate"] == 1e-3
    assert lines[2]["train/income/loss"] < lines[0]["train/income/loss"]
    result = metrics_of(run)
    best = max(range(3), key=lambda epoch: lines[epoch]["valid/income/auc"])
    assert result["best_epoch"] == best
    assert result["metrics"]["valid"]["income"]["auc"] == pytest.approx(lines[best]["valid/income/auc"], abs=1e-12)


def test_the_best_model_is_the_one_that_was_scored(run, census_folder):
    data = load_census(census_folder)
    model = fastmtl.from_pretrained(run / "best")
    assert evaluate_multi_task(model, data.loaders(256)[2]) == metrics_of(run)["metrics"]["test"]
    assert Encoder.load(run / "best" / "encoder.json").to_dict() == data.encoder.to_dict()
    saved = torch.load(run / "model_mmoe_1.pth", weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name])


def test_the_run_is_the_one_that_python_gives(run, census_folder, tmp_path):
    data = load_census(census_folder)
    torch.manual_seed(1)
    mlp = {"activation": "relu", "dropout": 0.0}
    model = fastmtl.models.MMOE(
        data.model_features(4), data.task_types, 3, {"dims": [16], **mlp}, [{"dims": [8], **mlp}] * 2
    )
    train, valid, test = data.loaders(256)
    MTLTrainer(
        model, optimizer_params={"lr": 1e-3, "weight_decay": 1e-4}, n_epoch=3, model_path=str(tmp_path), progress=False
    ).fit(train, valid)
    assert evaluate_multi_task(model, test) == metrics_of(run)["metrics"]["test"]


def test_the_resolved_configuration_repeats_the_run_bit_by_bit(cli, run, tmp_path):
    code, out, _ = cli("train", "--config", run / "config.yaml", "--run-dir", tmp_path / "again", "--json", "--quiet")
    assert code == 0
    again = tmp_path / "again"
    assert json.loads(out)["metrics"] == metrics_of(run)["metrics"]
    assert (again / "config.yaml").read_text() == (run / "config.yaml").read_text()
    assert (again / "best" / "model.safetensors").read_bytes() == (run / "best" / "model.safetensors").read_bytes()
    for mine, theirs in zip(
        (again / "metrics.jsonl").read_text().splitlines(),
        (run / "metrics.jsonl").read_text().splitlines(),
        strict=True,
    ):
        a, b = json.loads(mine), json.loads(theirs)
        del a["samples_per_second"], b["samples_per_second"]
        assert a == b


@pytest.mark.parametrize("model", ["sharedbottom", "mmoe", "ple", "esmm", "aitm"])
def test_each_model_trains_on_the_synthetic_log(cli, tmp_path, model):
    code, out, err = cli("train", *SMALL, "--model", model, "--run-dir", tmp_path / "run", "--json")
    assert code == 0, err
    result = json.loads(out)
    tasks = ["cvr", "ctr", "ctcvr"] if model == "esmm" else ["click", "purchase"]
    for split in ("valid", "test"):
        assert list(result["metrics"][split]) == tasks
    for task in tasks:
        assert 0 < result["metrics"]["test"][task]["auc"] < 1
        assert 0.5 < result["best_auc"][task] < 1
    assert result["data"]["rows"] == {"train": 1800, "valid": 600, "test": 600}
    assert result["samples_per_second"] > 0
    assert result["precision"] == "fp32 (exact)"
    assert set(result["backend"]) == {"embedding_bag", "expert_gate"}
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == result
    for word in ("data", "model", "backend", "precision", "threads", "seed", "1,800 train", "best auc possible"):
        assert word in err
    assert fastmtl.from_pretrained(tmp_path / "run" / "best").task_names == tasks


def test_esmm_learns_the_conversion_only_from_clicks():
    from fastmtl.cli.tasks import esmm_labels

    labels = esmm_labels(np.array([[0, 0], [1, 0], [1, 1]], dtype=np.float32))
    np.testing.assert_array_equal(labels, [[np.nan, 0, 0], [0, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize("weighting", ["uwl", "gradnorm", "metabalance"])
def test_the_losses_are_weighed_as_asked(cli, tmp_path, weighting):
    code, _, err = cli("train", *SMALL, f"train.weighting={weighting}", "--run-dir", tmp_path / "run")
    assert code == 0, err
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert ("loss_weight/click" in line) == (weighting != "metabalance")
    assert cli("evaluate", tmp_path / "run").code == 0


def test_without_json_the_table_is_on_stdout_and_the_rest_on_stderr(cli, tmp_path):
    code, out, err = cli("train", *SMALL, "--run-dir", tmp_path / "run", "--no-progress")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == ["task", "click", "purchase"]
    assert "best auc possible" in lines[0]
    assert err.count("epoch 0: click loss") == 1
    assert "everything is in" in err


def test_quiet_leaves_stderr_empty(cli, tmp_path):
    code, out, err = cli("train", *SMALL, "--run-dir", tmp_path / "run", "--quiet")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 3


def test_auto_takes_census_where_it_is_found_and_says_so(cli, tmp_path, census_folder, monkeypatch):
    monkeypatch.setenv("FASTMTL_DATA", str(census_folder))
    words = ("--epochs", 1, "--run-dir")
    code, _, err = cli("train", *words, tmp_path / "a")
    assert code == 0
    assert f"data set: census (found {census_folder}/census-income.data.gz)" in err
    code, _, err = cli("train", "auto", "--model", "esmm", *words, tmp_path / "b", "data.rows=1000")
    assert code == 0
    assert "data set: synthetic (esmm needs clicks" in err


def test_auto_takes_the_synthetic_log_where_there_is_no_census_and_says_so(cli, tmp_path):
    code, _, err = cli("train", "--rows", 1000, "--epochs", 1, "--run-dir", tmp_path / "a")
    assert code == 0
    assert "data set: synthetic (no census file is on this machine" in err


def test_the_default_run_folder_names_data_model_and_time(cli, tmp_path):
    assert cli("train", *SMALL, "--rows", 500).code == 0
    assert cli("train", *SMALL, "--rows", 500).code == 0
    runs = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(runs) == 2
    assert all(name.startswith("synthetic-mmoe-2") for name in runs)


def test_options_may_stand_anywhere(cli, tmp_path):
    words = ("--rows", 500, "synthetic", "--epochs", 1, "model.n_expert=2", "--seed", 4, "train.lr=0.01", "--quiet")
    assert cli("train", *words, "--run-dir", tmp_path / "run").code == 0
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (settings["model"]["n_expert"], settings["train"]["lr"], settings["train"]["seed"]) == (2, 0.01, 4)


def test_a_machine_without_matplotlib_is_told_so_in_one_line(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, _, err = cli("train", *SMALL, "--run-dir", tmp_path / "run")
    assert code == 0
    (line,) = [line for line in err.splitlines() if "matplotlib" in line]
    assert "fastmtl[plot]" in line
    assert not (tmp_path / "run" / "curves.png").exists()


def test_stopping_early_keeps_the_best_epoch(cli, tmp_path):
    words = ("synthetic", "--rows", 3000, "--epochs", 20, "--batch-size", 64, "--lr", 0.05, "--patience", 1, "--quiet")
    assert cli("train", *words, "train.stop_task=purchase", "--run-dir", tmp_path / "run").code == 0
    result = metrics_of(tmp_path / "run")
    assert result["stop_task"] == "purchase"
    assert result["epochs"] == result["best_epoch"] + 2 < 20


def test_a_run_that_is_no_number_keeps_its_best_epoch_and_says_so(cli, tmp_path, monkeypatch):
    step = MTLTrainer.train_one_epoch
    seen = []

    def fail_later(self, loader):
        seen.append(loader)
        if len(seen) == 2:
            raise FloatingPointError("task 'click': 3 of 256 predictions are NaN")
        return step(self, loader)

    monkeypatch.setattr(MTLTrainer, "train_one_epoch", fail_later)
    code, _, err = cli("train", *SMALL[:-4], "--epochs", 3, "--run-dir", tmp_path / "run", "--quiet")
    assert code == 1
    assert err.count("\n") == 1
    assert "task 'click'" in err
    assert str(tmp_path / "run" / "best") in err
    assert cli("evaluate", tmp_path / "run", "--quiet").code == 0


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_text("old")

    def write_half():
        with run_folder.replacing(file) as stream:
            stream.write("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert file.read_text() == "old"
    with run_folder.replacing(file) as stream:
        stream.write("new")
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.json"]


def test_a_number_that_is_none_is_null_in_json():
    assert run_folder.to_json({"auc": float("nan"), "of": [1.5, float("inf")]}) == '{"auc": null, "of": [1.5, null]}'
