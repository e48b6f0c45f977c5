"""MTLTrainer: torch-rechub's trainer, batch by batch instead of row by row."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ..basic.callback import EarlyStopper
from ..basic.loss_func import RegularizationLoss, multi_task_loss
from ..basic.metric import get_metric_func, metric_mode
from ..basic.tracking import BaseLogger
from ..data.schema import validate_labels
from ..errors import BadDataError, ConfigError, NotBuiltError
from ..weighting import MetaBalance, Strategy
from .arguments import library_task_type, save_weights, strategy_of, writable_folder
from .batches import training_batches
from .chain_steps import ChainSteps
from .device_epoch import DeviceEpochs, epochs_of, trains_here
from .device_scores import main_scores, outputs_on
from .evaluation import collect, labels_of, schema_of, to_device, unwrap
from .native_gradients import ChainGradients
from .optimizer import TaskLearningRates, make_optimizer, make_table_optimizer, sparse_updates
from .progress import Progress

DEFAULT_OPTIMIZER_PARAMS = {"lr": 1e-3, "weight_decay": 1e-5}


class MTLTrainer:
    """Trains, evaluates and exports a multi-task model.

    Args:
        model: one of :mod:`fastmtl.models`, bare or compiled.
        task_types: ``"classification"`` or ``"regression"`` for each task; None: the model's.
        optimizer_fn: a torch optimizer class.
        optimizer_params: its keywords; None: ``lr`` 1e-3 and ``weight_decay`` 1e-5 (coupled L2).
        regularization_params: keywords of :class:`~fastmtl.basic.loss_func.RegularizationLoss`.
        scheduler_fn: a torch learning-rate scheduler class, stepped once an epoch.
        scheduler_params: its keywords.
        adaptive_params: ``{"method": "uwl" | "gradnorm" | "metabalance", ...}``; the other entries are the method's
            (``alpha``; ``relax_factor``, ``beta``).
        n_epoch: epochs at most.
        earlystop_taskid: the task whose validation score decides which weights are best.
        earlystop_patience: epochs without improvement after which to stop.
        device: ``"cpu"``, ``"cuda:0"``.
        gpus: several GPU numbers: the model is wrapped in DataParallel.
        model_path: folder for ``model_{mode}_{seed}.pth``; made if missing, checked before training.
        model_logger: a :class:`~fastmtl.basic.tracking.BaseLogger`, or several.
        earlystop_mode: ``"max"`` or ``"min"``; for a regression task always ``"min"``, the score being an error.
        task_names: names of the tasks in logs and scores; None: the data's.
        amp: ``"bf16"`` for automatic mixed precision; None: fp32.
        progress: show a bar; None: where stderr is a terminal.
        embedding_update: how the tables are trained: ``"exact"``, torch's numbers at the cost of the rows looked up;
            ``"lazy"``: rows that are not looked up do not move, which trains another model; ``"dense"``: from
            gradients of whole tables; None: exact where the tables are large and it is possible (docs/optimizers.md).
        n_epochs, optimizer, task_weights_strategy, gradnorm_alpha, task_weights, task_specific_lr: the tutorial's
            keywords: ``n_epoch``; a MetaBalance (or an optimizer of torch); the adaptive method; its alpha; fixed loss
            weights; learning rates of tasks by name.

    Raises:
        ConfigError: a value that is not known or not possible, a folder that can't be written.
    """

    def __init__(
        self,
        model: nn.Module,
        task_types: Sequence[str] | None = None,
        optimizer_fn: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_params: Mapping[str, Any] | None = None,
        regularization_params: Mapping[str, float] | None = None,
        scheduler_fn: Callable[..., Any] | None = None,
        scheduler_params: Mapping[str, Any] | None = None,
        adaptive_params: Mapping[str, Any] | None = None,
        n_epoch: int = 10,
        earlystop_taskid: int = 0,
        earlystop_patience: int = 10,
        device: str | torch.device = "cpu",
        gpus: Sequence[int] | None = None,
        model_path: str = "./",
        model_logger: BaseLogger | Sequence[BaseLogger] | None = None,
        earlystop_mode: str = "max",
        *,
        task_names: Sequence[str] | None = None,
        amp: str | None = None,
        progress: bool | None = None,
        embedding_update: str | None = None,
        n_epochs: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        task_weights_strategy: str | None = None,
        gradnorm_alpha: float | None = None,
        task_weights: Sequence[float] | None = None,
        task_specific_lr: Mapping[str, float] | None = None,
    ) -> None:
        self.model = model
        inner = unwrap(model)
        self.task_types = inner.task_types if task_types is None else [*map(library_task_type, task_types)]
        self.n_task = len(self.task_types)
        if self.task_types != inner.task_types:
            raise ConfigError(f"task_types {self.task_types} are not the model's, {inner.task_types}")
        if task_names is not None:
            if len(task_names) != self.n_task:
                raise ConfigError(f"task_names has {len(task_names)} entries for {self.n_task} tasks")
            inner.task_names = list(task_names)
        if not 0 <= earlystop_taskid < self.n_task:
            raise ConfigError(f"earlystop_taskid {earlystop_taskid}: the model has the tasks 0 to {self.n_task - 1}")
        if amp not in (None, "bf16"):
            raise ConfigError(f"amp {amp!r} is not known; use 'bf16', or None for fp32")
        self.n_epoch = n_epoch if n_epochs is None else n_epochs
        self.earlystop_taskid = earlystop_taskid
        mode = "min" if metric_mode(self.task_types[earlystop_taskid]) == "min" else earlystop_mode
        self.early_stopper = EarlyStopper(earlystop_patience, mode)
        self.evaluate_fns = [get_metric_func(kind) for kind in self.task_types]
        self.reg_loss_fn = RegularizationLoss(**(regularization_params or {}))
        self.model_logger: Any = model_logger
        if embedding_update not in (None, "exact", "lazy", "dense"):
            raise ConfigError(f"embedding_update {embedding_update!r} is not known; use 'exact', 'lazy' or 'dense'")
        self.amp, self.progress, self.embedding_update = amp, progress, embedding_update
        self.strategy = strategy_of(adaptive_params, optimizer, task_weights_strategy, gradnorm_alpha, task_weights)
        self.adaptive_method = None if adaptive_params is None else adaptive_params.get("method")
        self.task_specific_lr = dict(task_specific_lr or {})
        self.optimizer_fn = optimizer_fn
        self.optimizer_params = dict(DEFAULT_OPTIMIZER_PARAMS if optimizer_params is None else optimizer_params)
        self.scheduler_fn, self.scheduler_params = scheduler_fn, dict(scheduler_params or {})
        self.optimizer: Any = None if isinstance(optimizer, MetaBalance) else optimizer
        self.scheduler: Any = None
        self.model_path = writable_folder(model_path)
        self.gpus = list(gpus or [])
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device {str(device)!r}: torch finds no GPU here; use device='cpu'")
        if len(self.gpus) > 1:
            self.model = nn.DataParallel(self.model, device_ids=self.gpus)
        self._is_ready = False
        if inner.is_built:
            self._prepare()

    # ------------------------------------------------------------------------------------------------- set-up

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks."""
        return unwrap(self.model).task_names

    @property
    def loss_weight(self) -> nn.Parameter | None:
        """Learned loss weights ``[T]`` (uwl, GradNorm), or None."""
        return self.strategy.weights() if self._is_ready else None

    def _prepare(self) -> None:
        """Strategy and optimizer, once the model has its parameters."""
        inner = unwrap(self.model)
        self.strategy.attach(inner, self.task_types)
        self.model.to(self.device)
        if self.optimizer is None:
            params = [p for p in self.model.parameters() if p.requires_grad]
            self.optimizer = self._table_optimizer(params) or make_optimizer(
                self.optimizer_fn, params, self.optimizer_params
            )
        if self.scheduler_fn is not None:
            self.scheduler = self.scheduler_fn(self.optimizer, **self.scheduler_params)
        self._task_rates: TaskLearningRates | None = None
        self._epochs: DeviceEpochs | None = None
        self._is_ready = True

    def _table_optimizer(self, params: list[nn.Parameter]) -> torch.optim.Optimizer | None:
        """An optimizer that updates the tables where they were looked up; None: a dense one is to do it."""
        inner, asked = unwrap(self.model), self.embedding_update
        if asked == "dense":
            return None
        several = type(self.strategy).backward is not Strategy.backward
        if several or self.model is not inner or self.reg_loss_fn.embedding_l1 or self.reg_loss_fn.embedding_l2:
            if asked is not None:
                raise ConfigError(
                    f"embedding_update {asked!r} needs a bare model, one backward a step and no penalty of the tables "
                    f"(regularization_params); leave it out, or use 'dense'"
                )
            return None
        tables = [table for table in inner.embedding.parameters() if table.requires_grad]
        features = inner.embedding.features
        return make_table_optimizer(self.optimizer_fn, params, self.optimizer_params, tables, asked, features)

    def _ready(self, *loaders: Any) -> None:
        """Build the model from the loaders' columns where that is still to be done, and look the data over."""
        inner = unwrap(self.model)
        schemas = [schema for schema in map(schema_of, loaders) if schema is not None]
        if not inner.is_built:
            if not schemas:
                raise NotBuiltError(
                    "the model's features are column names, and this loader does not say what its columns hold; use "
                    "DataGenerator's loaders, or call model.build(schema) first"
                )
            schema = schemas[0]
            for other in schemas[1:]:
                schema = schema.merge(other)
            inner.build(schema)
        if not self._is_ready:
            self._prepare()
        inner.take_task_names(getattr(loaders[0], "task_names", ()))
        if self.task_specific_lr and self._task_rates is None:
            base = self.optimizer.param_groups[0]["lr"]
            self._task_rates = TaskLearningRates(inner, self.task_specific_lr, base)

    def _check(self, loader: Any) -> None:
        """Refuse columns and labels that no model can take, before the first step."""
        schema = schema_of(loader)
        if schema is not None:
            schema.check([feature.name for feature in unwrap(self.model).features])
        labels = getattr(loader, "labels", None)
        if labels is not None:
            n = labels.shape[1]
            kinds = self.task_types if n == self.n_task else ["classification"] * n
            names = (
                self.task_names
                if n == self.n_task
                else getattr(loader, "task_names", None) or [f"task_{t}" for t in range(n)]
            )
            validate_labels(labels, kinds, names)

    # ----------------------------------------------------------------------------------------------- training

    def train_one_epoch(self, data_loader: Iterable) -> list[float]:
        """One pass over the loader.

        Args:
            data_loader: yields ``(x, y)``: a mapping of columns ``[B]`` or ``[B, L]``, and labels ``[B, T]``.

        Returns:
            The mean loss of each task over the batches.
        """
        self._ready(data_loader)
        self.model.train()
        if trains_here(self.model, self.device):
            means, self._rows_seen = epochs_of(self).run(data_loader)
            return means
        total = torch.zeros(self.n_task, device=self.device)
        batches = rows = 0
        gradients = self._gradients()
        with (
            sparse_updates(unwrap(self.model), self.optimizer),
            contextlib.closing(training_batches(data_loader, gradients)) as made,
            self._steps(gradients) as step,
        ):
            bar = Progress(data_loader, "train", self.progress, made)
            for x, y in bar:
                if y is None:
                    raise BadDataError("the training loader has no labels; give one that yields (x, y)")
                losses = step(x, y)
                total += losses
                batches += 1
                rows += len(y)
                bar.update(len(y), losses)
        if not batches:
            raise BadDataError("the training loader has no rows")
        self._rows_seen = rows
        return (total / batches).tolist()

    @contextlib.contextmanager
    def _steps(self, gradients: ChainGradients | None) -> Iterator[Callable[[Any, Any], Tensor]]:
        """What takes the steps of an epoch, each from a batch's x and y to its losses ``[T]``."""
        if gradients is None:
            yield self._step
            return
        with contextlib.closing(ChainSteps(self, gradients)) as steps:
            yield steps

    def _step(self, x: Mapping[str, Tensor], y: Any) -> Tensor:
        """One update; returns the losses ``[T]``, detached."""
        inner = unwrap(self.model)
        labels = labels_of(y, inner).to(self.device, non_blocking=True)
        x = to_device(x, self.device)
        with self._autocast():
            # DataParallel splits dicts, and nothing else that is a mapping
            outputs = self.model(dict(x) if isinstance(self.model, nn.DataParallel) else x)
        losses = self._losses(outputs.float(), labels)
        self.model.zero_grad()
        self.strategy.backward(losses, self.reg_loss_fn(self.model))
        self._update()
        return losses.detach()

    def _update(self) -> None:
        """Move the parameters by their gradients."""
        if self._task_rates is not None:
            self._task_rates.step(self.optimizer)
        else:
            self.optimizer.step()
        self.strategy.after_step()

    def _gradients(self) -> ChainGradients | None:
        """What takes the place of autograd, where that is possible."""
        if not self.reg_loss_fn.is_zero:
            return None
        with self._autocast():
            return ChainGradients.of(self.model, self.strategy)

    def _losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        try:
            return multi_task_loss(outputs, labels, self.task_types)
        except RuntimeError as error:
            self._explain_nan(outputs, error)
            raise

    def _explain_nan(self, outputs: Tensor, error: Exception) -> None:
        """Say which task and which parameter went wrong, where the predictions are no numbers."""
        for task, name in enumerate(self.task_names):
            bad = int((~torch.isfinite(outputs[:, task])).sum())
            if bad:
                state = unwrap(self.model).state_dict()
                broken = next((key for key, value in state.items() if not torch.isfinite(value).all()), None)
                cause = f"the parameter {broken!r} is not finite" if broken else "all parameters are finite"
                raise FloatingPointError(
                    f"task {name!r}: {bad} of {len(outputs)} predictions are NaN or infinite; {cause}. "
                    f"Lower the learning rate, or look for extreme values in the dense features"
                ) from error

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def fit(
        self, train_dataloader: Iterable, val_dataloader: Iterable, mode: str = "base", seed: int = 0
    ) -> list[list[float]]:
        """Train for ``n_epoch`` epochs or until the score stops improving; keep and save the best weights.

        Args:
            train_dataloader: yields ``(x, y)``.
            val_dataloader: yields ``(x, y)``; its scores choose the best weights.
            mode, seed: name the saved file, ``model_{mode}_{seed}.pth`` in ``model_path``.

        Returns:
            For each epoch the tasks' losses, then their validation scores.
        """
        if val_dataloader is None:
            raise BadDataError("fit: there are no validation rows; they choose the best weights, so give some")
        self._ready(train_dataloader, val_dataloader)
        for loader in (train_dataloader, val_dataloader):
            self._check(loader)
        for logger in self._loggers():
            logger.log_hyperparams(
                {"n_epoch": self.n_epoch, "learning_rate": self._lr(), "adaptive_method": self.adaptive_method}
            )
        log, holds_best = [], False
        for epoch in range(self.n_epoch):
            start = time.perf_counter()
            losses = self.train_one_epoch(train_dataloader)
            seconds = time.perf_counter() - start
            lr = self._lr()
            scores = self.evaluate(self.model, val_dataloader)
            self._step_scheduler(scores[self.earlystop_taskid])
            log.append([*losses, *scores])
            self._report(epoch, losses, scores, lr, self._rows_seen / seconds)
            score = scores[self.earlystop_taskid]
            holds_best = self.early_stopper.improves(score)
            if holds_best and epoch + 1 == self.n_epoch:
                break
            if self.early_stopper.stop_training(score, self.model.state_dict()):
                break
        if not holds_best:
            self._keep_best()
        with ThreadPoolExecutor(1) as beside:
            # a last epoch that is the best is copied while it is written, and need not be loaded
            copied = holds_best and beside.submit(self.early_stopper.stop_training, score, self.model.state_dict())
            save_weights(unwrap(self.model).state_dict(), os.path.join(self.model_path, f"model_{mode}_{seed}.pth"))
        if copied:
            copied.result()
        for logger in self._loggers():
            logger.finish()
        return log

    def _step_scheduler(self, score: float) -> None:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(score)
        elif self.scheduler is not None:
            self.scheduler.step()

    def _keep_best(self) -> None:
        best = self.early_stopper.best_weights
        if best is not None:
            self.model.load_state_dict(best)
        elif self.n_epoch:
            task = self.task_names[self.earlystop_taskid]
            warnings.warn(
                f"no epoch had a validation score for task {task!r} that improved; the last epoch's weights are kept",
                stacklevel=3,
            )

    def _report(self, epoch: int, losses: list[float], scores: list[float], lr: float, speed: float) -> None:
        """One line on stderr, and the same to the loggers."""
        names = self.task_names
        parts = [f"{n} loss {loss:.4f} score {score:.4f}" for n, loss, score in zip(names, losses, scores, strict=True)]
        if self.progress is not False:
            print(f"epoch {epoch}: {', '.join(parts)} ({speed:,.0f} samples/s)", file=sys.stderr)
        metrics: dict[str, Any] = {f"train/task_{t}_loss": loss for t, loss in enumerate(losses)}
        metrics |= {f"val/task_{t}_score": score for t, score in enumerate(scores)}
        metrics |= {"learning_rate": lr, "auc": scores[self.earlystop_taskid], "samples_per_second": speed}
        weights = self.loss_weight
        if weights is not None:
            metrics |= {f"loss_weight/task_{t}": weight for t, weight in enumerate(weights.tolist())}
        for logger in self._loggers():
            logger.log_metrics(metrics, step=epoch)

    def _loggers(self) -> list[BaseLogger]:
        if self.model_logger is None:
            return []
        return list(self.model_logger) if isinstance(self.model_logger, (list, tuple)) else [self.model_logger]

    def _lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    # --------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, model: nn.Module, data_loader: Iterable) -> list[float]:
        """The score of each task: AUC (NaN with a warning where undefined), or mean squared error.

        Args:
            model: the model to score, which need not be the trainer's.
            data_loader: yields ``(x, y)``.
        """
        with self._autocast():
            if trains_here(model, self.device):
                return main_scores(model, data_loader, self.device)
            outputs, labels = collect(model, data_loader, self.device)
        if labels is None:
            raise BadDataError("evaluate: the loader has no labels; give one that yields (x, y)")
        names = self.task_names
        return [fn(labels[:, task], outputs[:, task], names[task]) for task, fn in enumerate(self.evaluate_fns)]

    def predict(self, model: nn.Module, data_loader: Iterable) -> list[list[float]]:
        """Predictions as N lists of T numbers.

        Args:
            model: the model to ask, which need not be the trainer's.
            data_loader: yields x, or ``(x, y)``, whose labels are not looked at.
        """
        with self._autocast():
            if trains_here(model, self.device):
                return outputs_on(model, data_loader, self.device)[0].tolist()
            return collect(model, data_loader, self.device)[0].tolist()

    # ------------------------------------------------------------------------------------------------- export

    def export_onnx(
        self,
        output_path: str,
        dummy_input: Mapping[str, Tensor] | None = None,
        batch_size: int = 2,
        seq_length: int = 10,
        opset_version: int = 14,
        dynamic_batch: bool = True,
        device: str | None = None,
        verbose: bool = False,
        onnx_export_kwargs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Write the model as ONNX, see :func:`fastmtl.utils.onnx_export.export_onnx` (extra ``onnx``)."""
        from ..utils.onnx_export import export_onnx

        export_onnx(
            unwrap(self.model), output_path, dummy_input, batch_size, seq_length, opset_version, dynamic_batch,
            device or "cpu", verbose, onnx_export_kwargs,
        )  # fmt: skip
        return True

    def visualization(
        self,
        input_data: Mapping[str, Tensor] | None = None,
        batch_size: int = 2,
        seq_length: int = 10,
        depth: int = 3,
        show_shapes: bool = True,
        expand_nested: bool = True,
        save_path: str | None = None,
        graph_name: str = "model",
        device: str | None = None,
        dpi: int = 300,
        **kwargs: Any,
    ) -> Any:
        """Draw the model's graph, see :func:`fastmtl.utils.visualization.visualize_model` (extra ``visualization``)."""
        from ..utils.visualization import visualize_model

        return visualize_model(
            unwrap(self.model), input_data, batch_size, seq_length, depth, show_shapes, expand_nested, save_path,
            graph_name, device or "cpu", dpi, **kwargs,
        )  # fmt: skip
