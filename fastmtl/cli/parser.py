"""The words of the command line. What the options of a run mean and may be is said in :mod:`fastmtl.cli.keys`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from ..errors import ConfigError
from .keys import FLAGS, KEYS, Key

EXAMPLES = """examples:
  fastmtl train                              census where its file is found, else a synthetic log
  fastmtl train synthetic --model ple --epochs 5
  fastmtl train --config run.yaml model.n_expert=4 train.lr=3e-4
  fastmtl evaluate runs/census-mmoe-20260102-101500
  fastmtl predict runs/census-mmoe-20260102-101500 people.csv --out predictions.csv
  fastmtl doctor
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors like all others: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line.

    Args:
        words: what stands behind ``fastmtl``.

    Returns:
        A namespace with ``command`` and the command's own arguments; those of ``train`` are texts, not yet checked.

    Raises:
        ConfigError: an unknown command or option, or one without its value.
    """
    parser = _build()
    args, more = parser.parse_known_args(words)
    if args.command == "train":
        # argparse takes words between options only once; further ones come back as unknown
        args.words += [word for word in more if not word.startswith("-")]
        more = [word for word in more if word.startswith("-")]
    if more:
        raise ConfigError(f"unknown argument {more[0]!r} (see fastmtl {args.command} --help)")
    return args


def _build() -> _Parser:
    parser = _Parser(
        prog="fastmtl",
        description="Train, evaluate and use multi-task recommender models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastmtl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--quiet", action="store_true", help="nothing on stderr but warnings and errors")
    _add_train(commands, common)
    _add_evaluate(commands, common)
    _add_predict(commands, common)
    doctor = commands.add_parser("doctor", parents=[common], help="what runs here, and why the rest does not")
    doctor.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


def _add_train(commands: argparse._SubParsersAction, common: _Parser) -> None:
    train = commands.add_parser(
        "train",
        parents=[common],
        help="train a model, and keep the best weights in a run folder",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="every option has a key; KEY=VALUE sets any of them, --config FILE many:\n"
        + "\n".join(map(_line, KEYS)),
    )
    train.add_argument(
        "words", nargs="*", metavar="DATA | KEY=VALUE",
        help="data set: census, synthetic, or auto (census where its file is found, else synthetic)",
    )  # fmt: skip
    train.add_argument("--config", metavar="FILE", help="YAML file of keys, for example a run's config.yaml")
    for flag, key in FLAGS.items():
        train.add_argument(flag, dest=key.name, metavar=key.metavar, help=key.help)
    train.add_argument("--run-dir", metavar="DIR", help="folder of the run (runs/<data>-<model>-<time>)")
    train.add_argument("--no-progress", action="store_true", help="no progress bar, one line an epoch")
    train.add_argument("--json", action="store_true", help="one JSON object on stdout at the end")


def _add_evaluate(commands: argparse._SubParsersAction, common: _Parser) -> None:
    evaluate = commands.add_parser("evaluate", parents=[common], help="score a trained model")
    evaluate.add_argument("run", metavar="RUN", help="folder of a run, or of a saved model with its encoder.json")
    evaluate.add_argument(
        "data", nargs="?", metavar="DATA",
        help="a data set (census, synthetic), or a CSV or Parquet file with the raw columns and the labels; "
        "without it the run's own data",
    )  # fmt: skip
    evaluate.add_argument("--batch-size", type=_rows, metavar="ROWS", help="rows in a batch (the run's)")
    evaluate.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1 (%(default)s)")
    evaluate.add_argument("--backend", default="auto", metavar="NAME", help="auto, native, eager (%(default)s)")
    evaluate.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _add_predict(commands: argparse._SubParsersAction, common: _Parser) -> None:
    predict = commands.add_parser("predict", parents=[common], help="probabilities for the rows of a file")
    predict.add_argument("run", metavar="RUN", help="folder of a run, or of a saved model with its encoder.json")
    predict.add_argument("file", metavar="FILE", help="CSV (with a header) or Parquet file with the raw columns")
    predict.add_argument(
        "--out", required=True, metavar="FILE", help="where to: .csv, .csv.gz, .parquet, or - for CSV on stdout"
    )
    predict.add_argument("--batch-size", type=_rows, default=4096, metavar="ROWS", help="rows in a batch (%(default)s)")
    predict.add_argument("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1 (%(default)s)")
    predict.add_argument("--backend", default="auto", metavar="NAME", help="auto, native, eager (%(default)s)")


def _rows(text: str) -> int:
    rows = int(text)
    if rows < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rows, at least 1")
    return rows


def _line(key: Key) -> str:
    """A key in the help text."""
    return f"  {key.name:22} {key.help}"
