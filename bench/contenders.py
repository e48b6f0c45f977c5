"""Who is compared in a step and in a model call, and how each is run. Every contender starts from the same weights.

A step is forward, losses, backward and optimizer on a batch that lies ready; torch-rechub's is the body of its
trainer's loop, fastmtl's its trainer's own. The optimizer is Adam with decay, exact for all but FBGEMM's, which has
no Adam on a CPU and does row-wise Adagrad instead: it is held to the others' losses in the first step alone.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from bench import equality
from bench.models import build
from bench.shapes import Shape
from fastmtl import backend
from fastmtl.basic.batch import ColumnBatch
from fastmtl.basic.loss_func import multi_task_loss
from fastmtl.optim.waiting import MOST_MISSED
from fastmtl.trainers import MTLTrainer
from fastmtl.trainers.optimizer import sparse_updates

PEER = "torch-rechub"
PEER_BF16 = "torch-rechub bf16 + fused Adam"
SETTINGS = {"lr": 1e-3, "weight_decay": 1e-5}
SEED = 2022
#: Losses of so many first steps are compared with float64's.
CHECKED_STEPS = 3


@dataclass
class Setting:
    """A model on a shape, its first weights and its batches.

    Args:
        shape, model: what is trained.
        batch_size: B.
        n_batches: how many there are; steps go round them.
    """

    shape: Shape
    model: str
    batch_size: int
    n_batches: int
    batches: list[tuple[dict[str, Tensor], Tensor]] = field(init=False)
    state: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        x, y = self.shape.rows(self.batch_size * self.n_batches)
        columns = {name: torch.from_numpy(column).split(self.batch_size) for name, column in x.items()}
        labels = torch.from_numpy(y).split(self.batch_size)
        self.batches = [
            ({name: parts[i].clone() for name, parts in columns.items()}, labels[i]) for i in range(self.n_batches)
        ]
        torch.manual_seed(SEED)
        self.state = build("torch_rechub", self.model, self.shape).state_dict()

    def nudged(self, seed: int) -> Setting:
        """The same from weights that differ in their last bits."""
        other = copy(self)
        other.state = equality.nudged(self.state, seed)
        return other

    @cached_property
    def column_batches(self) -> list[tuple[ColumnBatch, Tensor]]:
        """The batches as fastmtl's loaders yield them."""
        return [(ColumnBatch.from_columns(x), y) for x, y in self.batches]

    @property
    def dense_params(self) -> int:
        """Parameters that are in no table."""
        running = ("running_mean", "running_var", "num_batches_tracked")
        return sum(
            value.numel() for key, value in self.state.items() if "embed" not in key and not key.endswith(running)
        )


class Runner:
    """One contender at work.

    Args:
        setting: what it trains.
        amp: under bf16 autocast.
    """

    model: nn.Module

    def __init__(self, setting: Setting, amp: bool) -> None:
        self.setting, self.amp, self.count = setting, amp, 0

    def step(self) -> Tensor:
        """The next batch; its losses [T]."""
        raise NotImplementedError

    def predict(self, x: Mapping[str, Tensor]) -> Tensor:
        """Probabilities [B, T]; the model is in evaluation mode."""
        with torch.no_grad(), self.autocast():
            return self.model(x)

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 where asked for."""
        return torch.autocast("cpu", torch.bfloat16) if self.amp else contextlib.nullcontext()

    def inputs(self, batch: int) -> list[Any]:
        """The setting's batches, cut to ``batch`` rows, as the package's loaders make them."""
        return [{name: column[:batch] for name, column in x.items()} for x, _ in self.setting.batches]

    def close(self) -> None:
        """Leave contexts."""

    def _next(self, batches: list[Any]) -> Any:
        self.count += 1
        return batches[(self.count - 1) % len(batches)]


class RechubRunner(Runner):
    """torch-rechub's model; ``fused``: with torch's fused Adam; ``dtype``: of the parameters and what follows."""

    def __init__(
        self,
        setting: Setting,
        compiled: bool = False,
        amp: bool = False,
        fused: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(setting, amp)
        self.dtype = dtype
        bare = build("torch_rechub", setting.model, setting.shape)
        bare.load_state_dict(setting.state)
        bare.to(dtype)
        self.optimizer = torch.optim.Adam(bare.parameters(), fused=fused or None, **SETTINGS)
        self.model = torch.compile(bare) if compiled else bare

    def step(self) -> Tensor:
        x, y = self._next(self.setting.batches)
        with self.autocast():
            out = self.model(x)
        out, y = out.to(self.dtype), y.to(self.dtype)
        losses = [nn.functional.binary_cross_entropy(out[:, t], y[:, t]) for t in range(y.shape[1])]
        loss = sum(losses) / len(losses)
        self.model.zero_grad()
        loss.backward()
        self.optimizer.step()
        return torch.tensor([one.item() for one in losses])


class FastRunner(Runner):
    """fastmtl's model and trainer; ``name``: the backend forced, None: its own choice."""

    def __init__(self, setting: Setting, name: str | None, compiled: bool = False, amp: bool = False) -> None:
        super().__init__(setting, amp)
        self.name = name
        self.bare: Any = build("fastmtl", setting.model, setting.shape)
        self.bare.load_state_dict(setting.state)
        self.model = torch.compile(self.bare) if compiled else self.bare
        self.stack = contextlib.ExitStack()
        with self._forced(), tempfile.TemporaryDirectory() as folder:  # it is written when training ends, not here
            self.trainer = MTLTrainer(
                self.model, optimizer_params=SETTINGS, model_path=folder, progress=False, amp="bf16" if amp else None
            )

    def _forced(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.name is None else backend.use_backend(self.name)

    def step(self) -> Tensor:
        with self._forced():
            if self.count == 0:
                # for as long as this runner lives: the rows are current when an epoch ends, not after each step
                self.stack.enter_context(sparse_updates(self.bare, self.trainer.optimizer))
                self.model.train()
                self.train_step = self.stack.enter_context(self.trainer._steps(self.trainer._gradients()))
            return self.train_step(*self._next(self.setting.column_batches))

    def predict(self, x: Mapping[str, Tensor]) -> Tensor:
        with self._forced():
            return super().predict(x)

    def inputs(self, batch: int) -> list[Any]:
        return [ColumnBatch.from_columns(x) for x in super().inputs(batch)]

    def close(self) -> None:
        self.stack.close()


class FbgemmRunner(Runner):
    """FBGEMM's table-batched embeddings (row-wise Adagrad) in front of fastmtl's batched experts in plain PyTorch."""

    def __init__(self, setting: Setting, amp: bool = False) -> None:
        import fbgemm_gpu  # noqa: F401  (registers its ops)
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        super().__init__(setting, amp)
        shape = setting.shape
        self.model: Any = build("fastmtl", setting.model, shape)
        self.model.load_state_dict(setting.state)
        self.tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, shape.embed_dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in shape.vocabs],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=SETTINGS["lr"],
        )  # fmt: skip
        for i, table in enumerate(self.tables.split_embedding_weights()):
            table.copy_(setting.state[f"embedding.embed_dict.s{i}.weight"])
        tables = {id(p) for p in self.model.embedding.parameters()}
        dense = [p for p in self.model.parameters() if id(p) not in tables]
        self.optimizer = torch.optim.Adam(dense, fused=True, **SETTINGS)

    def _forward(self, x: Mapping[str, Tensor]) -> Tensor:
        ids = torch.cat([x[f"s{i}"] for i in range(len(self.setting.shape.vocabs))])
        row = self.tables(ids, torch.arange(len(ids) + 1))
        dense = [x[f"d{i}"].unsqueeze(1) for i in range(self.setting.shape.n_dense)]
        with backend.use_backend("eager"), self.autocast():
            return self.model._predict(torch.cat([row, *dense], dim=1))

    def step(self) -> Tensor:
        x, y = self._next(self.setting.batches)
        losses = multi_task_loss(self._forward(x).float(), y, self.model.task_types)
        self.optimizer.zero_grad()
        losses.mean().backward()
        self.optimizer.step()
        return losses.detach()

    def predict(self, x: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return self._forward(x)


@dataclass(frozen=True)
class Contender:
    """A name, how it computes and how it is made.

    Args:
        name: in the tables.
        precision: ``"fp32"`` or ``"bf16"``.
        make: its runner for a setting.
        same_steps: whether its optimizer is Adam, so that later losses must agree too.
        compiled: by torch.compile, which takes a minute.
        warm_steps: steps until the work of one is that of all later ones.
    """

    name: str
    precision: str
    make: Callable[[Setting], Runner]
    same_steps: bool = True
    compiled: bool = False
    warm_steps: int = 3


def contenders(compiled: bool = True, embed_dim: int = 4) -> tuple[list[Contender], dict[str, str]]:
    """(who runs, who does not -> why), torch-rechub first.

    Args:
        compiled: with torch.compile's.
        embed_dim: width of the tables; FBGEMM wants multiples of four.
    """
    runs = [
        Contender(PEER, "fp32", RechubRunner),
        Contender("torch-rechub compiled", "fp32", partial(RechubRunner, compiled=True), compiled=True),
        Contender(PEER_BF16, "bf16", partial(RechubRunner, amp=True, fused=True)),
        Contender("fastmtl eager", "fp32", partial(FastRunner, name="eager")),
        Contender("fastmtl eager compiled", "fp32", partial(FastRunner, name="eager", compiled=True), compiled=True),
    ]
    missing = {}
    if find_spec("fbgemm_gpu") is None:
        missing["FBGEMM"] = "fbgemm_gpu is not installed (pip install --no-deps fbgemm-gpu-cpu)"
    elif embed_dim % 4:
        missing["FBGEMM"] = f"its tables have a multiple of four columns, not {embed_dim}"
    else:
        runs += [
            Contender("FBGEMM TBE + batched experts", "fp32", FbgemmRunner, same_steps=False),
            Contender("FBGEMM TBE + batched experts bf16", "bf16", partial(FbgemmRunner, amp=True), same_steps=False),
        ]
    if "native" in backend.available():
        # rows are swept until they have missed as many steps as they do in a long run
        warm = MOST_MISSED + 2
        runs += [
            Contender("fastmtl native", "fp32", partial(FastRunner, name="native"), warm_steps=warm),
            Contender("fastmtl native bf16", "bf16", partial(FastRunner, name=None, amp=True), warm_steps=warm),
        ]
    else:
        missing["fastmtl native"] = str(backend.TABLE["expert_gate"]["native"].unavailable())
    if not compiled:
        missing |= {one.name: "left out by --no-compile" for one in runs if one.compiled}
        runs = [one for one in runs if not one.compiled]
    return runs, missing


def check_steps(runs: list[Contender], runners: dict[str, Runner], setting: Setting) -> dict[str, float]:
    """Take the first steps with every contender.

    Returns:
        contender -> the greatest relative distance of its losses from those of torch-rechub's model in float64.

    Raises:
        SystemExit: one is too far away (:mod:`bench.equality`).
    """
    exact = _first_losses(RechubRunner(setting, dtype=torch.float64))
    losses = {one.name: _first_losses(runners[one.name]) for one in runs}
    first = len(exact) // CHECKED_STEPS
    held = {one.name: losses[one.name] if one.same_steps else losses[one.name][:first] for one in runs}
    moved = (setting.nudged(seed) for seed in equality.NUDGES)
    peers = [losses[PEER], *(_first_losses(RechubRunner(one)) for one in moved)]
    return equality.check(held, {one.name: one.precision for one in runs}, exact, peers, given=first)


def _first_losses(runner: Runner) -> list[float]:
    return torch.cat([runner.step() for _ in range(CHECKED_STEPS)]).tolist()


def check_predictions(runs: list[Contender], runners: dict[str, Runner], batch: int) -> dict[str, float]:
    """Predict one batch with every contender, all in evaluation mode from the first weights.

    Returns:
        contender -> the greatest distance of a probability from torch-rechub's.

    Raises:
        SystemExit: fp32 differs by more than 1e-5, bf16 by more than 3e-2.
    """
    out = {one.name: runners[one.name].predict(runners[one.name].inputs(batch)[0]).float() for one in runs}
    distances = {one.name: (out[one.name] - out[PEER]).abs().max().item() for one in runs}
    for one in runs:
        if not distances[one.name] <= (1e-5 if one.precision == "fp32" else 3e-2):
            raise SystemExit(f"{one.name}: its predictions are {distances[one.name]:.1e} away from torch-rechub's")
    return distances
