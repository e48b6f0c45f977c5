"""Defaults < file < flags and KEY=VALUE, and every wrong key or value named."""

import inspect

import pytest
import yaml

from fastmtl.cli import config
from fastmtl.cli.keys import BY_NAME, FLAGS, KEYS, MODELS, OF_DATA, OF_MODEL
from fastmtl.data import load_census, load_synthetic
from fastmtl.errors import ConfigError


def resolved(words=(), flags=None, file=None, data="census", model="mmoe"):
    return config.resolve(config.gather(file, list(words), flags or {}), data, model)


@pytest.fixture
def write(tmp_path):
    def to_file(text):
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return to_file


def test_defaults_of_census_are_those_of_the_published_comparison():
    settings = resolved()
    expected = {
        "model.name": "mmoe", "model.n_expert": 8, "model.expert_dims": [16], "model.tower_dims": [8],
        "model.embed_dim": 4, "train.batch_size": 1024, "train.lr": 1e-3, "train.weight_decay": 1e-4,
        "train.epochs": 10,
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    ple = resolved(model="ple")
    assert [ple[f"model.{k}"] for k in ("n_level", "n_expert_specific", "n_expert_shared")] == [1, 2, 1]
    assert ple["model.tower_dims"] == resolved(model="sharedbottom")["model.tower_dims"] == [8]
    assert resolved(model="sharedbottom")["model.bottom_dims"] == [117]
    assert resolved(model="aitm")["model.bottom_dims"] == [32, 16]
    assert resolved(data="synthetic", model="esmm")["model.tower_dims"] == [16, 8]


def test_the_defaults_of_a_data_set_are_those_of_its_loader():
    synthetic = {name: p.default for name, p in inspect.signature(load_synthetic).parameters.items()}
    settings = resolved(data="synthetic")
    assert settings["data.rows"] == synthetic["n_rows"]
    for name in ("seed", "relatedness", "scale"):
        assert settings[f"data.{name}"] == synthetic[name]
    census = {name: p.default for name, p in inspect.signature(load_census).parameters.items()}
    settings = resolved(data="census")
    assert (settings["data.split_seed"], settings["data.verify"]) == (census["seed"], census["verify"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("data", ["census", "synthetic"])
def test_every_run_has_a_value_for_each_of_its_keys_and_no_other(model, data):
    settings = resolved(data=data, model=model)
    assert set(settings) == {key.name for key in KEYS if key.belongs_to(data, model)}
    missing = [name for name, value in settings.items() if value is None and not BY_NAME[name].optional]
    assert missing == []
    for defaults in (*OF_DATA.values(), *OF_MODEL.values()):
        assert set(defaults) <= set(BY_NAME)


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(write):
    file = write("train: {epochs: 3, lr: 2e-3, seed: 5}\nmodel:\n  n_expert: 4\ntrain.patience: 7\n")
    settings = resolved(["model.n_expert=6"], {"train.lr": "3e-4"}, file)
    assert settings["train.epochs"] == 3
    assert settings["train.lr"] == 3e-4
    assert settings["train.seed"] == 5
    assert settings["train.patience"] == 7
    assert settings["model.n_expert"] == 6
    assert settings["train.batch_size"] == 1024


@pytest.mark.parametrize("model", MODELS)
def test_a_configuration_survives_its_file(write, model):
    settings = resolved(["train.lr=0.00030000000000000003", "model.tower_dims=[7, 5]"], data="synthetic", model=model)
    text = config.to_yaml(settings)
    assert "tower_dims: [7, 5]" in text
    assert resolved(file=write(text), data="synthetic", model=model) == settings


@pytest.mark.parametrize(
    ("text", "value"), [("[64, 32]", [64, 32]), ("64,32", [64, 32]), ("64", [64]), ("[64,32,16]", [64, 32, 16])]
)
def test_widths_are_written_in_several_ways(text, value):
    assert resolved([f"model.tower_dims={text}"])["model.tower_dims"] == value


@pytest.mark.parametrize("text", ["null", "none", ""])
def test_an_optional_key_may_have_no_value(text):
    assert resolved([f"model.embed_dim={text}"])["model.embed_dim"] is None


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("model.n_experts=4", ["'model.n_experts'", "model.n_expert"]),
        ("train.learning_rate=1", ["'train.learning_rate'", "train.lr"]),
        ("zzz=1", ["'zzz'", "the known ones are", "train.lr"]),
        ("epochs=3", ["'epochs'", "train.epochs"]),
        ("train.epochs=ten", ["train.epochs is 'ten'", "a whole number", "at least 1"]),
        ("train.epochs=1.5", ["train.epochs is 1.5", "a whole number"]),
        ("train.epochs=true", ["train.epochs is True", "a whole number"]),
        ("train.epochs=0", ["train.epochs is 0", "at least 1"]),
        ("train.lr=fast", ["train.lr is 'fast'", "a number", "above 0"]),
        ("train.lr=nan", ["train.lr is 'nan'", "a number"]),
        ("train.lr=[1]", ["train.lr is [1]", "a number"]),
        ("train.lr=", ["train.lr is None", "a number"]),
        ("data.verify=3", ["data.verify is 3", "true or false"]),
        ("model.tower_dims=[8, 0]", ["model.tower_dims is [8, 0]", "list of whole numbers"]),
        ("model.tower_dims=8;4", ["model.tower_dims is '8;4'", "list of whole numbers"]),
        ("model.dropout=1", ["model.dropout is 1", "at most 0.999"]),
        ("model.name=mmo", ["model.name", "'mmo'", "mmoe"]),
        ("train.weighting=gradnrom", ["train.weighting", "'gradnrom'", "gradnorm"]),
        ("train.amp=fp8", ["train.amp", "'fp8'", "none, bf16"]),
        ("censsus", ["data.name", "'censsus'", "census"]),
        ("train.lr={", ["train.lr", "no YAML value"]),
    ],
)
def test_a_wrong_word_is_named_with_what_was_expected(word, named):
    with pytest.raises(ConfigError) as caught:
        resolved([word])
    for part in named:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("words", "data", "model", "named"),
    [
        (["model.n_expert=4"], "census", "ple", ["'ple'", "'model.n_expert'", "mmoe", "model.n_expert_shared"]),
        (["data.rows=100"], "census", "mmoe", ["'census'", "'data.rows'", "synthetic", "data.path"]),
        (["data.path=x"], "synthetic", "mmoe", ["'synthetic'", "'data.path'", "census", "data.rows"]),
    ],
)
def test_a_key_of_another_model_or_data_set_is_refused(words, data, model, named):
    with pytest.raises(ConfigError) as caught:
        resolved(words, data=data, model=model)
    for part in named:
        assert part in str(caught.value)


def test_a_key_given_twice_is_refused_unless_it_is_the_same():
    assert resolved(["train.lr=0.01"], {"train.lr": "1e-2"})["train.lr"] == 0.01
    with pytest.raises(ConfigError, match=r"train\.lr is given twice.*0\.01.*0\.02"):
        resolved(["train.lr=0.01"], {"train.lr": "0.02"})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: {epochs: 3", ["is no YAML", "line"]),
        ("- a\n- b\n", ["['a', 'b']", "sections"]),
        ("trian: {epochs: 3}\n", ["'trian.epochs'", "train.epochs"]),
        ("train: 3\n", ["unknown key 'train'"]),
        ("train: {epochs: many}\n", ["train.epochs is 'many'", "a whole number"]),
        ("train: !!python/object/apply:os.system ['true']\n", ["is no YAML"]),
    ],
)
def test_a_wrong_file_is_named(write, text, named):
    file = write(text)
    with pytest.raises(ConfigError) as caught:
        resolved(file=file)
    for part in (file, *named):
        assert part in str(caught.value)


def test_an_empty_file_changes_nothing(write):
    assert resolved(file=write("# nothing yet\n")) == resolved()


def test_flags_are_keys():
    assert {key.name for key in FLAGS.values()} <= {key.name for key in KEYS}
    assert yaml.safe_load(config.to_yaml(resolved()))["model"]["expert_dims"] == [16]
