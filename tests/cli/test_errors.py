"""Every mistake of a user: exit code 2, one line on stderr that names the thing, no traceback, nothing left behind."""

import pytest


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("", ["COMMAND"]),
        ("trian", ["'trian'", "train"]),
        ("train censsus", ["'censsus'", "census"]),
        ("train synthetic --model mmo", ["'mmo'", "mmoe"]),
        ("train synthetic model.n_experts=4", ["'model.n_experts'", "model.n_expert"]),
        ("train synthetic --epochs ten", ["train.epochs", "'ten'", "whole number"]),
        ("train synthetic --epochs", ["--epochs"]),
        ("train synthetic --speed 3", ["--speed"]),
        ("train synthetic census", ["data.name", "twice"]),
        ("train synthetic --backend turbo", ["'turbo'", "native", "eager"]),
        ("train synthetic --device tpu", ["'tpu'", "cpu"]),
        ("train synthetic --device cuda:77", ["'cuda:77'"]),
        ("train synthetic --config nowhere.yaml", ["nowhere.yaml", "No such file"]),
        ("train synthetic --rows 3", ["data.rows", "3", "10"]),
        ("train synthetic model.activation=rleu", ["'rleu'", "relu"]),
        ("train synthetic --rows 500 train.stop_task=buy", ["'buy'", "click, purchase"]),
        ("train census", ["Census-Income", "UCI", "cache"]),
        ("train census --data-path nowhere", ["nowhere", "UCI"]),
        ("train census --model esmm", ["esmm", "synthetic"]),
        ("train census data.verify=false", ["data.verify", "data.path"]),
        ("evaluate nowhere", ["nowhere", "folder"]),
        ("evaluate .", ["best", "config.json"]),
        ("predict nowhere people.csv --out p.csv", ["nowhere", "folder"]),
        ("predict nowhere people.csv", ["--out"]),
        ("predict nowhere people.csv --out p.csv --batch-size 0", ["--batch-size", "'0'"]),
    ],
)
def test_one_line_names_the_mistake(cli, tmp_path, words, named):
    code, out, err = cli(*words.split())
    assert (code, out) == (2, "")
    assert err.startswith("fastmtl: error: ")
    assert err.count("\n") == 1
    for part in named:
        assert part in err
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("command", ["evaluate {run} nowhere.csv", "predict {run} nowhere.csv --out p.csv"])
def test_a_missing_file_is_named(cli, run, command):
    code, _, err = cli(*command.format(run=run).split())
    assert (code, err.count("\n")) == (2, 1)
    assert "nowhere.csv" in err


def test_an_unknown_data_set_to_evaluate_is_named(cli, run):
    code, _, err = cli("evaluate", run, "censsus")
    assert (code, err.count("\n")) == (2, 1)
    assert "did you mean census" in err


def test_an_unwritable_run_folder_is_found_before_the_data_is_read(cli, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, _, err = cli("train", "census", "--run-dir", tmp_path / "file" / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert str(tmp_path / "file" / "run") in err
    assert "Census" not in err


def test_a_run_folder_with_something_in_it_is_left_alone(cli, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    code, _, err = cli("train", "synthetic", "--run-dir", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "holds files already" in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "encoder.json"])
@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_a_damaged_model_is_named(cli, run, tmp_path, name, damage):
    import shutil

    shutil.copytree(run / "best", tmp_path / "model" / "best")
    file = tmp_path / "model" / "best" / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"{ garbage")
    code, _, err = cli("evaluate", tmp_path / "model")
    assert (code, err.count("\n")) == (2, 1), err
    assert str(tmp_path / "model") in err


def test_an_unexpected_failure_is_one_line_and_its_traceback_comes_on_request(cli, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("the moon is full")

    monkeypatch.setattr("fastmtl.cli.train.make_model", fail)
    words = ("train", "synthetic", "--rows", 500, "--run-dir", tmp_path / "run", "--quiet")
    code, _, err = cli(*words)
    assert (code, err.count("\n")) == (1, 1)
    assert "RuntimeError: the moon is full" in err
    assert "--debug" in err
    code, _, err = cli(*words, "--debug")
    assert code == 1
    assert "Traceback" in err
    assert not (tmp_path / "run").exists()
