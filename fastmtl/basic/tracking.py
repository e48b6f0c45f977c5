"""Loggers: where a trainer sends its metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from ..errors import require


class BaseLogger(ABC):
    """What a trainer needs of an experiment tracker."""

    @abstractmethod
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record named values at a step (an epoch); None: the tracker's own count."""

    @abstractmethod
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Record the run's configuration."""

    @abstractmethod
    def finish(self) -> None:
        """Flush and close."""


class WandbLogger(BaseLogger):
    """Weights & Biases (extra ``wandb``).

    Args:
        project, name, config, tags, notes, dir: as in ``wandb.init``.
        **kwargs: passed on to ``wandb.init``.
    """

    def __init__(
        self,
        project: str,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        dir: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._wandb = require("wandb", "wandb", "WandbLogger")
        self.run = self._wandb.init(
            project=project, name=name, config=config, tags=tags, notes=notes, dir=dir, **kwargs
        )

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._wandb.log(dict(metrics), step=step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        if self.run is not None:
            self.run.config.update(dict(params))

    def finish(self) -> None:
        if self.run is not None:
            self.run.finish()


class SwanLabLogger(BaseLogger):
    """SwanLab (extra ``swanlab``).

    Args:
        project, experiment_name, description, config, logdir: as in ``swanlab.init``.
        **kwargs: passed on to ``swanlab.init``.
    """

    def __init__(
        self,
        project: str | None = None,
        experiment_name: str | None = None,
        description: str | None = None,
        config: dict[str, Any] | None = None,
        logdir: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._swanlab = require("swanlab", "swanlab", "SwanLabLogger")
        self.run = self._swanlab.init(
            project=project,
            experiment_name=experiment_name,
            description=description,
            config=config,
            logdir=logdir,
            **kwargs,
        )

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self._swanlab.log(dict(metrics), step=step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        if self.run is not None:
            self.run.config.update(dict(params))

    def finish(self) -> None:
        self._swanlab.finish()


class TensorBoardXLogger(BaseLogger):
    """TensorBoardX (extra ``tensorboardx``).

    Args:
        log_dir: folder of the event files.
        comment: appended to the folder's name.
        **kwargs: passed on to ``tensorboardX.SummaryWriter``.
    """

    def __init__(self, log_dir: str, comment: str = "", **kwargs: Any) -> None:
        tensorboard = require("tensorboardX", "tensorboardx", "TensorBoardXLogger")
        self.writer = tensorboard.SummaryWriter(log_dir=log_dir, comment=comment, **kwargs)
        self._step = 0

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        if step is None:
            step, self._step = self._step, self._step + 1
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self.writer.add_text("hyperparameters", "\n".join(f"{name}: {value}" for name, value in params.items()), 0)

    def finish(self) -> None:
        self.writer.close()
