"""``fastmtl train``: from a configuration to a run folder."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__, backend
from ..data.multitask import MultiTaskData
from ..errors import ConfigError, MissingExtraError
from ..trainers import MTLTrainer, evaluate_multi_task
from . import config, run_folder
from .curves import draw_curves
from .keys import FLAGS
from .models import describe, make_model
from .report import EpochLines, Voice, print_table, scores_table
from .run_folder import EpochLog
from .setup import backends_of, check_device, chosen_backend, listed
from .tasks import STOP_TASK, choose_data, load_data

Settings = dict[str, Any]


def run(args: argparse.Namespace) -> None:
    """Train as the arguments say; the scores go to stdout, the rest to stderr and the run folder."""
    voice = Voice(args.quiet)
    flags = {key.name: getattr(args, key.name) for key in FLAGS.values() if getattr(args, key.name) is not None}
    given = config.gather(args.config, args.words, flags)
    model_name = given.value("model.name")
    data_set, why = choose_data(given.value("data.name"), given.value("data.path"), model_name)
    settings = config.resolve(given, data_set, model_name)
    settings["train.backend"] = chosen_backend(settings["train.backend"])
    check_device(settings["train.device"])
    folder = Path(args.run_dir) if args.run_dir else run_folder.default_folder(data_set, model_name)
    run_folder.make_folder(folder)
    if why:
        voice.say(f"data set: {data_set} ({why})")
    forced = settings["train.backend"]
    with backend.use_backend(None if forced == "auto" else forced):
        try:
            run = _Run(settings, folder, voice, False if args.quiet or args.no_progress else None)
        except BaseException:
            run_folder.drop_if_empty(folder)
            raise
        run.fit()
        result = run.finish()
    table = scores_table(result["metrics"], result["best_auc"])
    if args.json:
        print(run_folder.to_json(result))
        if args.quiet:
            return
    print_table(*table, sys.stderr if args.json else sys.stdout)
    voice.say(f"{result['samples_per_second']:,.0f} samples/s in training; everything is in {folder}")


class _Run:
    """One training run: everything that can be wrong with what was asked for is found while it is made.

    Args:
        settings: the complete configuration.
        folder: the run's folder, empty.
        voice: says how it goes.
        progress: the trainer's; False for one line an epoch.
    """

    def __init__(self, settings: Settings, folder: Path, voice: Voice, progress: bool | None) -> None:
        self.settings, self.folder, self.voice = settings, folder, voice
        self.backends = backends_of(torch.device(settings["train.device"]), settings["train.amp"])
        self.data = load_data(settings)
        self.stop_task = _stop_task(settings, self.data)
        torch.manual_seed(settings["train.seed"])
        self.model = make_model(settings, self.data)
        self.loaders = self.data.loaders(settings["train.batch_size"])
        self.log = EpochLog(folder / run_folder.EPOCHS, self.data.task_names, self.data.task_types)
        loggers = [self.log, *([EpochLines(voice, self.data.task_names)] if progress is False else [])]
        method = settings["train.weighting"]
        self.trainer = MTLTrainer(
            self.model,
            optimizer_params={"lr": settings["train.lr"], "weight_decay": settings["train.weight_decay"]},
            adaptive_params=None if method == "mean" else {"method": method},
            n_epoch=settings["train.epochs"],
            earlystop_taskid=self.data.task_names.index(self.stop_task),
            earlystop_patience=settings["train.patience"],
            device=settings["train.device"],
            model_path=str(folder),
            model_logger=loggers,
            task_names=self.data.task_names,
            amp=None if settings["train.amp"] == "none" else settings["train.amp"],
            progress=progress,
        )
        self.seconds = 0.0

    def fit(self) -> None:
        """Train; what the best epoch found is saved also where the user or the arithmetic ends it early."""
        self._announce()
        (self.folder / run_folder.CONFIG).write_text(config.to_yaml(self.settings), encoding="utf-8")
        start = time.perf_counter()
        try:
            self.trainer.fit(*self.loaders[:2], mode=self.settings["model.name"], seed=self.settings["train.seed"])
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._keep_what_there_is()) from None
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; {self._keep_what_there_is()}") from error
        self.seconds = time.perf_counter() - start

    def _keep_what_there_is(self) -> str:
        """Save the best weights of a run that did not end; say so."""
        best = self.trainer.early_stopper.best_weights
        if best is None:
            return "no epoch was over, so nothing is saved"
        self.model.load_state_dict(best)
        self._save_best()
        return f"{len(self.log.epochs)} epochs were over, their best weights are in {self.folder / run_folder.BEST}"

    def finish(self) -> dict[str, Any]:
        """Score, save and draw.

        Returns:
            What metrics.json holds.
        """
        self._save_best()
        _, valid, test = self.loaders
        epochs, best_epoch = self.log.epochs, self._best_epoch()
        result = {
            "run": str(self.folder),
            "data": {"name": self.data.name, "note": self.data.note, "rows": _rows(self.data)},
            "model": self.settings["model.name"],
            "seed": self.settings["train.seed"],
            "epochs": len(epochs),
            "best_epoch": best_epoch,
            "stop_task": self.stop_task,
            "metrics": {
                "valid": evaluate_multi_task(self.model, valid),
                "test": evaluate_multi_task(self.model, test),
            },
            "best_auc": dict(self.data.best_auc),
            "samples_per_second": statistics.median(line["samples_per_second"] for line in epochs),
            "seconds": self.seconds,
            "backend": self.backends,
            "precision": _precision(self.settings),
            "device": self.settings["train.device"],
            "threads": torch.get_num_threads(),
            "versions": {"fastmtl": __version__, "torch": torch.__version__},
        }
        with run_folder.replacing(self.folder / run_folder.METRICS) as file:
            file.write(run_folder.to_json(result, indent=2) + "\n")
        title = f"{self.settings['model.name']} on {self.data.name}, seed {self.settings['train.seed']}"
        try:
            draw_curves(self.folder / run_folder.CURVES, epochs, self.data.task_names, best_epoch, title)
        except MissingExtraError as error:
            self.voice.say(f"no {run_folder.CURVES}: {error}")
        return result

    def _save_best(self) -> None:
        best = self.folder / run_folder.BEST
        self.model.save_pretrained(best)
        self.data.encoder.save(best / run_folder.ENCODER)

    def _best_epoch(self) -> int | None:
        """The epoch whose weights were kept; None where no epoch had a score."""
        scores = [line.get(f"valid/{self.stop_task}/auc") for line in self.log.epochs]
        known = [score for score in scores if score is not None and score == score and score > 0]
        return scores.index(max(known)) if known else None

    def _announce(self) -> None:
        data, settings = self.data, self.settings
        rows = ", ".join(f"{n:,} {name}" for name, n in _rows(data).items())
        tasks = ", ".join(f"{name} ({share:.1%})" for name, share in _positive_shares(data).items())
        n_sparse = sum(spec.kind == "sparse" for spec in data.features)
        self.voice.facts(
            {
                "data": f"{data.note}",
                "rows": f"{rows}; {n_sparse} sparse and {len(data.features) - n_sparse} dense features",
                "tasks": f"{tasks}; {self.stop_task} chooses the best epoch",
                "model": describe(settings, self.model),
                "training": f"at most {settings['train.epochs']} epochs, batches of {settings['train.batch_size']:,}, "
                f"Adam lr {settings['train.lr']:g}, weight decay {settings['train.weight_decay']:g}, "
                f"losses by {settings['train.weighting']}, seed {settings['train.seed']}",
                "backend": listed(self.backends),
                "precision": _precision(settings),
                "device": f"{settings['train.device']}, {torch.get_num_threads()} threads",
                "run": str(self.folder),
            }
        )


def _stop_task(settings: Settings, data: MultiTaskData) -> str:
    name = settings["train.stop_task"] or STOP_TASK.get(settings["model.name"], data.task_names[0])
    if name not in data.task_names:
        raise ConfigError(f"train.stop_task: no task {name!r}; {config.nearest(name, data.task_names)}")
    settings["train.stop_task"] = name
    return name


def _rows(data: MultiTaskData) -> dict[str, int]:
    return {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)}


def _positive_shares(data: MultiTaskData) -> Mapping[str, float]:
    labels = torch.from_numpy(data.train.y)
    return dict(zip(data.task_names, labels.nanmean(dim=0).tolist(), strict=True))


def _precision(settings: Settings) -> str:
    return "fp32 (exact)" if settings["train.amp"] == "none" else "bf16 (automatic mixed precision)"
