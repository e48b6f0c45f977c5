"""Optimizers as the trainer makes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import backend, optim
from ..backends import cuda, native
from ..backends.updates import ROWWISE_ADAGRAD
from ..errors import ConfigError
from ..models.multi_task import MTLModel
from ..optim.rules import why_not
from . import device_optimizer
from .device_optimizer import DeviceOptimizer


class Counterparts(NamedTuple):
    """What takes the place of an optimizer: on the CPU, and on a GPU."""

    cpu: type[optim.TableOptimizer]
    device: type[DeviceOptimizer]


#: Optimizers that can train tables where they were looked up: torch's, which have fused implementations too, and one
#: that knows no other way.
SPARSE: dict[Any, Counterparts] = {
    torch.optim.Adam: Counterparts(optim.Adam, device_optimizer.Adam),
    torch.optim.AdamW: Counterparts(optim.AdamW, device_optimizer.AdamW),
    torch.optim.SGD: Counterparts(optim.SGD, device_optimizer.SGD),
    torch.optim.Adagrad: Counterparts(optim.Adagrad, device_optimizer.Adagrad),
    optim.RowwiseAdagrad: Counterparts(optim.RowwiseAdagrad, device_optimizer.RowwiseAdagrad),
}
#: Embedding parameters from which sparse updates are cheaper than dense ones.
LARGE_TABLES = 4_000_000


def make_optimizer(
    optimizer_fn: Callable[..., torch.optim.Optimizer], params: Sequence[nn.Parameter], settings: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """``optimizer_fn(params, **settings)``: in one native pass on the CPU, ready for a CUDA graph on a GPU, else fused
    where torch can.

    Who says ``fused`` or ``foreach`` gets torch's own.
    """
    settings = dict(settings)
    plain = all(p.dtype == torch.float32 and p.device.type in ("cpu", "cuda") for p in params)
    if optimizer_fn in SPARSE and plain and not {"fused", "foreach", "differentiable"} & set(settings):
        own: Any = None
        if all(backend.is_device(p.device) for p in params):
            own = SPARSE[optimizer_fn].device
        elif not native.unavailable() and backend.forced() in (None, "native") and all(p.is_cpu for p in params):
            own = SPARSE[optimizer_fn].cpu
        if own is not None and why_not(optimizer_fn, settings) is None:
            optimizer_fn = own
        else:
            settings["fused"] = True
    try:
        return optimizer_fn(params, **settings)
    except TypeError as error:
        name = getattr(optimizer_fn, "__name__", repr(optimizer_fn))
        raise ConfigError(f"optimizer_params: {name} does not take {dict(settings)}: {error}") from None


def make_table_optimizer(
    optimizer_fn: Callable[..., torch.optim.Optimizer],
    params: Sequence[nn.Parameter],
    settings: Mapping[str, Any],
    tables: Sequence[nn.Parameter],
    embedding_update: str | None,
    features: Sequence[Any] = (),
) -> torch.optim.Optimizer | None:
    """``optimizer_fn``'s counterpart (:data:`SPARSE`), where it can train the tables sparsely and that pays.

    Args:
        optimizer_fn, params, settings: as for :func:`make_optimizer`.
        tables: the embedding tables among the parameters.
        features: who reads them.
        embedding_update: ``"exact"`` or ``"lazy"``; None: ``"exact"`` where the tables are large.

    Returns:
        The optimizer; None where the tables are small and nothing was asked for.

    Raises:
        ConfigError: ``embedding_update``, or an optimizer for tables only, was asked for and is not possible; the
            message says why.
    """
    reason = _why_dense(optimizer_fn, settings, tables, features)
    if reason and embedding_update is not None:
        raise ConfigError(f"embedding_update {embedding_update!r} is not possible: {reason}")
    if optimizer_fn is optim.RowwiseAdagrad:
        if reason:
            raise ConfigError(f"RowwiseAdagrad is not possible: {reason}")
        embedding_update = embedding_update or "exact"
    is_large = sum(table.numel() for table in tables) >= LARGE_TABLES
    if reason or (embedding_update is None and not is_large):
        return None
    own: Any = SPARSE[optimizer_fn].device if backend.is_device(tables[0].device) else SPARSE[optimizer_fn].cpu
    made: Any = partial(own, tables=tables, embedding_update=embedding_update or "exact")
    made.__name__ = own.__name__
    return make_optimizer(made, params, settings)


@contextlib.contextmanager
def sparse_updates(model: MTLModel, optimizer: Any) -> Iterator[None]:
    """While this lasts the tables' gradients are sparse, where the optimizer takes them so; then every row is current.

    Args:
        model: a built model.
        optimizer: any; only a :class:`fastmtl.optim.TableOptimizer` or its like for GPUs changes anything.
    """
    if not isinstance(optimizer, (optim.TableOptimizer, DeviceOptimizer)) or not optimizer.tables:
        yield
        return
    model.embedding.updater = optimizer
    try:
        yield
    finally:
        model.embedding.updater = None
        optimizer.flush()


def _why_dense(
    optimizer_fn: Callable[..., torch.optim.Optimizer],
    settings: Mapping[str, Any],
    tables: Sequence[nn.Parameter],
    features: Sequence[Any],
) -> str | None:
    """Why the tables can't be updated sparsely; None: they can."""
    if optimizer_fn not in SPARSE:
        names = sorted(fn.__name__ for fn in SPARSE if fn.__module__.startswith("torch."))
        return f"only {', '.join(names)} of torch.optim have a sparse form"
    if not tables:
        return "no table is trained"
    if any(table.dtype != torch.float32 for table in tables):
        return "the tables are not float32"
    runs = backend.resolve("embedding_bag", *tables)
    if backend.is_device(tables[0].device):
        if not hasattr(runs, "embedding_bag_bwd_step"):
            return f"embedding_bag runs on {runs.__name__} here, which takes no optimizer's step in its backward"
        if optimizer_fn is optim.RowwiseAdagrad and runs is cuda:
            wide = [table.shape[1] for table in tables if not cuda.takes(ROWWISE_ADAGRAD, table.shape[1])]
            if wide:
                return f"the cuda backend takes no row-wise step of rows {wide[0]} wide; triton does"
        if any(getattr(feature, "pooling", None) == "max" for feature in features):
            return "a feature takes a maximum, whose backward takes no optimizer's step on a GPU"
    elif any(table.device.type != "cpu" for table in tables):
        return "the tables are neither on the CPU nor on a GPU"
    elif runs is not native:
        return f"embedding_bag does not run on the native backend here ({native.unavailable() or 'another is forced'})"
    return why_not(optimizer_fn, settings)


class TaskLearningRates:
    """Learning rates of single tasks: what is one task's own moves by ``lr_task / lr`` of the optimizer's step.

    The update rules of torch's optimizers are linear in the learning rate, so that this equals a parameter group for
    each task, for parameters that are stored batched.

    Args:
        model: a built model.
        rates: task name -> learning rate.
        base: the optimizer's learning rate.

    Raises:
        ConfigError: an unknown task; the message lists the tasks.
    """

    def __init__(self, model: MTLModel, rates: Mapping[str, float], base: float) -> None:
        self.factors: dict[nn.Parameter, torch.Tensor] = {}
        for name, rate in rates.items():
            if name not in model.task_names:
                raise ConfigError(f"task_specific_lr: no task {name!r}; the tasks are {', '.join(model.task_names)}")
            for p, rows in model.task_rows(model.task_names.index(name)).items():
                factor = self.factors.setdefault(p, torch.ones(len(p), *[1] * (p.ndim - 1), device=p.device))
                for part in rows:
                    factor[part] = rate / base

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer's step."""
        before = [p.clone() for p in self.factors]
        optimizer.step()
        for (p, factor), old in zip(self.factors.items(), before, strict=True):
            p.sub_(old).mul_(factor).add_(old)
