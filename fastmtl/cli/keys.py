"""Every key of a run's configuration: its type, its limits, which models or data sets have it, its default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DATA_SETS = ("census", "synthetic")
MODELS = ("sharedbottom", "mmoe", "ple", "esmm", "aitm")
WEIGHTINGS = ("mean", "uwl", "gradnorm", "metabalance")


@dataclass(frozen=True)
class Key:
    """One key.

    Args:
        name: dotted, "section.key".
        kind: "int", "float", "bool", "str" or "widths" (a list of whole numbers).
        help: one line.
        default: where neither the model nor the data set says another.
        choices: the possible texts.
        least: the least number.
        above: numbers must be greater than this.
        most: the greatest number.
        optional: may be null.
        models: the models that have it; empty for all.
        data_sets: the data sets that have it; empty for all.
        metavar: its value's name in the help text.
    """

    name: str
    kind: str
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    least: float | None = None
    above: float | None = None
    most: float | None = None
    optional: bool = False
    models: tuple[str, ...] = ()
    data_sets: tuple[str, ...] = ()
    metavar: str = "N"

    def belongs_to(self, data_set: str, model: str) -> bool:
        """Whether a run of this model on this data set has the key."""
        return (not self.models or model in self.models) and (not self.data_sets or data_set in self.data_sets)


KEYS = (
    Key("data.name", "str", "data set: " + ", ".join((*DATA_SETS, "auto")), "auto", (*DATA_SETS, "auto")),
    Key(
        "data.path", "str", "census: its file, or the folder that holds it", optional=True, data_sets=("census",),
        metavar="PATH",
    ),
    Key("data.verify", "bool", "census: compare a file with its published hash", True, data_sets=("census",)),
    Key("data.split_seed", "int", "census: seed of the split", 2022, least=0, data_sets=("census",)),
    Key("data.rows", "int", "synthetic: rows of the log", 200_000, least=10, data_sets=("synthetic",)),
    Key("data.seed", "int", "synthetic: seed of the log", 0, least=0, data_sets=("synthetic",)),
    Key(
        "data.relatedness", "float", "synthetic: how related the tasks are, 0 to 1", 0.8, least=0, most=1,
        data_sets=("synthetic",),
    ),
    Key(
        "data.scale", "float", "synthetic: share of Ali-CCP's vocabularies", 0.001, above=0, most=1,
        data_sets=("synthetic",),
    ),
    Key("model.name", "str", "model: " + ", ".join(MODELS), "mmoe", MODELS, metavar="NAME"),
    Key("model.embed_dim", "int", "width of the embeddings; null chooses by vocabulary", 4, least=1, optional=True),
    Key("model.n_expert", "int", "mmoe: experts", 8, least=1, models=("mmoe",)),
    Key("model.n_level", "int", "ple: levels", 1, least=1, models=("ple",)),
    Key("model.n_expert_specific", "int", "ple: experts of each task's own", 2, least=1, models=("ple",)),
    Key("model.n_expert_shared", "int", "ple: shared experts", 1, least=1, models=("ple",)),
    Key("model.expert_dims", "widths", "mmoe, ple: layers of an expert", [16], models=("mmoe", "ple")),
    Key("model.bottom_dims", "widths", "sharedbottom, aitm: layers of the bottom", models=("sharedbottom", "aitm")),
    Key("model.tower_dims", "widths", "layers of a tower", [8]),
    Key("model.activation", "str", "relu, sigmoid, leakyrelu, prelu, dice, gelu ...", "relu"),
    Key("model.dropout", "float", "dropout behind each hidden layer, 0 to below 1", 0.0, least=0, most=0.999),
    Key("train.epochs", "int", "epochs at most", 10, least=1),
    Key("train.seed", "int", "seed of weights and batches", 1, least=0),
    Key("train.batch_size", "int", "rows in a batch", 1024, least=1),
    Key("train.lr", "float", "learning rate of Adam", 1e-3, above=0, metavar="X"),
    Key("train.weight_decay", "float", "L2 of Adam", 1e-4, least=0, metavar="X"),
    Key("train.patience", "int", "epochs without a better score before it stops", 10, least=1),
    Key("train.stop_task", "str", "task whose score chooses the best epoch", optional=True),
    Key("train.weighting", "str", "how the losses are weighed: " + ", ".join(WEIGHTINGS), "mean", WEIGHTINGS),
    Key("train.device", "str", "cpu, cuda, cuda:1", "cpu", metavar="NAME"),
    Key("train.amp", "str", "none (fp32, exact) or bf16 (mixed precision)", "none", ("none", "bf16"), metavar="NAME"),
    Key("train.backend", "str", "auto, or the name of one: native, eager ...", "auto", metavar="NAME"),
)  # fmt: skip

BY_NAME: dict[str, Key] = {key.name: key for key in KEYS}

#: The options that have a flag of their own.
FLAGS: dict[str, Key] = {
    "--model": BY_NAME["model.name"],
    "--epochs": BY_NAME["train.epochs"],
    "--seed": BY_NAME["train.seed"],
    "--batch-size": BY_NAME["train.batch_size"],
    "--lr": BY_NAME["train.lr"],
    "--weight-decay": BY_NAME["train.weight_decay"],
    "--embed-dim": BY_NAME["model.embed_dim"],
    "--patience": BY_NAME["train.patience"],
    "--device": BY_NAME["train.device"],
    "--amp": BY_NAME["train.amp"],
    "--backend": BY_NAME["train.backend"],
    "--rows": BY_NAME["data.rows"],
    "--data-path": BY_NAME["data.path"],
}

#: Defaults that depend on the model.
OF_MODEL: dict[str, Mapping[str, Any]] = {
    "sharedbottom": {"model.bottom_dims": [117]},
    "mmoe": {},
    "ple": {},
    "esmm": {"model.tower_dims": [16, 8]},
    "aitm": {"model.bottom_dims": [32, 16]},
}

#: Defaults that depend on the data set.
OF_DATA: dict[str, Mapping[str, Any]] = {
    "census": {},
    # measured on 200,000 rows: with less weight decay or wider layers the purchases, which are few, are learnt by heart
    "synthetic": {
        "model.expert_dims": [32],
        "model.dropout": 0.1,
        "train.epochs": 8,
        "train.batch_size": 512,
        "train.lr": 3e-3,
        "train.weight_decay": 3e-4,
    },
}
