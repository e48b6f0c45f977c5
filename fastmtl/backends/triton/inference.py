"""Whole models packed for prediction on a GPU: a lookup, then one launch a layer of experts and gates (two where a tile
of the batch does not fit a program), the towers and the sigmoid in the last one.

The program of a model is described as for the CPU (fastmtl/backends/native_inference.py). A layer that the folded
kernel does not take (more than two hidden layers, activations of whole rows) runs as in training, by its running
statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError
from ...spec import EmbeddingSpec, ExpertGateParams, ExpertGateSpec
from .. import deferred, libraries
from . import configs
from .embedding_bag_forward import check, embedding_bag_fwd
from .embedding_plan import plans
from .expert_gate_forward import expert_gate_fwd
from .folded import run_folded
from .folded_stages import ACTIVATIONS, stages_of
from .folded_stages import why_not as why_not_staged
from .launch import Operation, call, cdiv, generation, noting, repeatable
from .packing import PackedLayer, PackedTowers, why_not
from .precision import of_dtype
from .replay import Replay


class _Stage(NamedTuple):
    """A layer on numbered matrices, and the numbers of its results: matrices, or logits of an output layer."""

    spec: ExpertGateSpec
    params: ExpertGateParams
    inputs: tuple[int, ...]
    results: tuple[int, ...]


class Program:
    """A model as stages over numbered matrices of some rows; matrix 0 is the looked-up row.

    Args:
        width: columns of a looked-up row.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.stages: list[_Stage] = []
        self.outputs: list[tuple[str, int, int]] = []
        self._matrices, self._logits = 1, 0

    def layer(self, spec: ExpertGateSpec, params: ExpertGateParams, inputs: Sequence[int]) -> list[int]:
        """See :meth:`fastmtl.backends.native_inference.Program.layer`."""
        if spec.output_layer:
            results = range(self._logits, self._logits + spec.n_experts)
            self._logits = results.stop
        else:
            results = range(self._matrices, self._matrices + (len(spec.gates) or spec.n_experts))
            self._matrices = results.stop
        self.stages.append(_Stage(spec, params, tuple(inputs), tuple(results)))
        return list(results)

    def transfer(self, qkv: Tensor, own: int, info: int) -> int:
        """AITM's attention, which has no kernel of its own: such a model is run layer by layer."""
        raise ConfigError("attention between tasks has no kernel for GPUs")

    def output(self, kind: str, logit: int, other: int = 0) -> None:
        """See :meth:`fastmtl.backends.native_inference.Program.output`."""
        self.outputs.append((kind, logit, other))

    def pack(self, bf16: bool) -> PackedProgram:
        """Fold the batch normalisations and pack the weights, in fp32 or rounded to bf16."""
        return PackedProgram(self, torch.bfloat16 if bf16 else torch.float32)


class _Refusals:
    """Refused ids of one lookup. Who asks for them waits for the lookup alone: what was queued behind it goes on."""

    def __init__(self, device: torch.device) -> None:
        self.bad = torch.full((1,), deferred.NO_POSITION, dtype=torch.int64, device=device)
        self._seen, self._arrived = self.bad, None

    def post(self) -> None:
        """The lookup is queued."""
        if self.bad.is_cuda:
            self._seen = self.bad.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.current_stream(self.bad.device).record_event()

    def check(self, ids: Tensor, columns: tuple[int, ...], spec: EmbeddingSpec) -> None:
        """Raise :class:`BadIdError` for the first, if there is one."""
        if self._arrived is not None:
            self._arrived.synchronize()
        check(self._seen, ids, columns, spec)


class _Kept(NamedTuple):
    """What calls with the same key do: the launches, how many of them are the lookup's, whether refused ids raise,
    the shape of the result; and whose ids the key has."""

    replay: Replay
    n_lookups: int
    raises: bool
    shape: torch.Size
    owners: tuple[Any, ...]


#: The layer with its towers in CUDA C++ (csrc/cuda/folded.cuh).
_ON_HOPPER = Operation(
    "folded",
    lambda *arguments: torch.ops.fastmtl_cuda.folded(*arguments),
    ("X_ptr", "stages", "is_probability", "activation", "Out_ptr"),
)
#: Rows of its tiles. With fewer tiles than half the multiprocessors, those that share a tile's experts are sooner done.
_TILE = 128

#: Kinds of calls (batch sizes, mostly) that are kept, and marks for a kind that was seen once, or can't be kept.
_MOST_KEPT, _ONCE, _NEVER = 256, 1, 2


class PackedProgram:
    """A packed model: constant, and safe to run from many threads at once. Made by :meth:`Program.pack`.

    From its second call with batches of one size on, a call repeats the launches of the one before (replay.py).
    """

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        self.dtype, self._outputs = dtype, program.outputs
        self._n_logits = sum(stage.spec.n_experts for stage in program.stages if stage.spec.output_layer)
        self._runs: list[Callable[[dict[int, Tensor], dict[int, Tensor]], None]] = []
        self._constants: list[Tensor] = []
        self._kept: dict[tuple[Any, ...], _Kept | int] = {}
        stages = program.stages
        heads = [stage for stage in stages if stage.spec.output_layer]
        #: Whether the last kernel writes predictions, not logits: all come from one stage, each from one logit.
        self._in_kernel = (
            len(heads) == 1
            and why_not(heads[0].spec) is None
            and [logit for _, logit, _ in program.outputs] == list(range(self._n_logits))
            and all(kind != "product" for kind, _, _ in program.outputs)
        )
        self._is_probability = None
        if self._in_kernel:
            is_probability = [kind == "probability" for kind, _, _ in program.outputs]
            self._is_probability = torch.tensor(is_probability, device=heads[0].params.bias[0].device)
        #: Whether a call is nothing but launches of kernels.
        self._is_launches_alone = self._in_kernel
        skipped = False
        for stage, follows in zip(stages, [*stages[1:], None], strict=True):
            if skipped:
                skipped = False
            elif why_not(stage.spec):
                self._runs.append(self._as_in_training(stage))
                self._is_launches_alone = False
            else:
                skipped = (
                    self._can_fuse_towers(stage) and follows is not None and _reads_one_by_one(follows, stage, stages)
                )
                self._runs.append(self._folded(stage, follows if skipped else None))

    def _can_fuse_towers(self, stage: _Stage) -> bool:
        # elsewhere than on Hopper their products in fp32 find no registers beside a mixture
        return self.dtype is torch.bfloat16 or generation(stage.params.bias[0].device) == 9

    def _as_in_training(self, stage: _Stage) -> Callable[[dict[int, Tensor], dict[int, Tensor]], None]:
        def run(matrices: dict[int, Tensor], logits: dict[int, Tensor]) -> None:
            out, _ = expert_gate_fwd(_gathered(stage, matrices), stage.params, stage.spec, False)
            if stage.spec.output_layer:
                logits.update(zip(stage.results, out.unbind(1), strict=True))
            else:
                matrices.update(zip(stage.results, out, strict=True))

        return run

    def _folded(self, stage: _Stage, towers: _Stage | None) -> Callable[[dict[int, Tensor], dict[int, Tensor]], None]:
        last = towers or stage
        is_probability = self._is_probability if last.spec.output_layer else None
        layer = PackedLayer(stage.spec, stage.params, is_probability if towers is None else None, self.dtype)
        packed_towers = None
        if towers is not None:
            packed_towers = PackedTowers(towers.spec, towers.params, layer.h2, is_probability, self.dtype)
        arguments = {**layer.arguments(), **(packed_towers or layer).tower_arguments()}
        self._constants += [value for value in arguments.values() if isinstance(value, Tensor)]
        stages = _staged(layer, packed_towers)

        def run(matrices: dict[int, Tensor], logits: dict[int, Tensor]) -> None:
            x, out = _gathered(stage, matrices), None
            if last.spec.output_layer:
                out = torch.empty(x.shape[1], last.spec.n_experts, dtype=torch.float32, device=x.device)
            if stages is not None and out is not None and _fits(x):
                call(_ON_HOPPER, X_ptr=x[0], stages=stages, is_probability=is_probability,
                     activation=ACTIVATIONS.index(stage.spec.activation), Out_ptr=out)  # fmt: skip
                found = out
            else:
                found = run_folded(x, layer, of_dtype(self.dtype), out, packed_towers)
            if out is None:
                matrices.update(zip(stage.results, found, strict=True))
            elif self._in_kernel:
                logits[-1] = out
            else:
                logits.update(zip(last.results, out.unbind(1), strict=True))

        return run

    def run(
        self, tables: list[Tensor], ids: Tensor | None, columns: tuple[int, ...], dense: Tensor | None,
        spec: EmbeddingSpec,
    ) -> Tensor:  # fmt: skip
        """Predict a batch.

        Args:
            tables, ids, columns, dense, spec: as for :func:`fastmtl.ops.embedding_bag`; ids None where there are no
                bags.

        Returns:
            Predictions ``[B, T]`` float32.

        Raises:
            BadIdError: an id outside its vocabulary whose bag says ``oov="raise"``.
        """
        if ids is None or len(ids) == 0 or not self._is_launches_alone or not repeatable():
            return self._run(tables, ids, columns, dense, spec, None)
        watch = deferred.active()
        precision = torch.get_float32_matmul_precision() if self.dtype is torch.float32 else ""
        key = (_kind(ids), columns, dense is not None and _kind(dense), id(spec), id(watch), precision,
               *map(Tensor.data_ptr, tables))  # fmt: skip
        kept = self._kept.get(key)
        if isinstance(kept, _Kept):
            return self._repeat(kept, ids, columns, dense, spec)
        if kept is not _ONCE:
            if len(self._kept) >= _MOST_KEPT:
                self._kept.clear()
            self._kept.setdefault(key, _ONCE)
            return self._run(tables, ids, columns, dense, spec, None)
        raises = watch is None and any(bag.oov == "raise" for bag in spec.bags)
        refusals = _Refusals(ids.device) if raises else None
        with noting() as launches:
            out = self._run(tables, ids, columns, dense, spec, refusals)
        given = {"ids": ids, "out": out}
        given |= {} if dense is None else {"dense": dense}
        given |= {} if refusals is None else {"bad": refusals.bad}
        read = plans(spec, columns, configs.EMBEDDING.tiny_vocab, ids.device)
        constants = [*self._constants, *tables, *(table.slots for table in read)]
        constants += [] if watch is None else [watch.bad, watch.found]
        try:
            made = Replay(launches, given, constants)
        except ValueError:
            self._kept[key] = _NEVER
        else:
            self._kept[key] = _Kept(made, len(read), raises, out.shape, (spec, watch))
        return out

    def _repeat(
        self, kept: _Kept, ids: Tensor, columns: tuple[int, ...], dense: Tensor | None, spec: EmbeddingSpec
    ) -> Tensor:
        out = torch.empty(kept.shape, dtype=torch.float32, device=ids.device)
        given = {"ids": ids, "out": out}
        if dense is not None:
            given["dense"] = dense
        if not kept.raises:
            kept.replay(given)
            return out
        refusals = _Refusals(ids.device)
        kept.replay({**given, "bad": refusals.bad}, {kept.n_lookups - 1: refusals.post})
        refusals.check(ids, columns, spec)
        return out

    def _run(
        self, tables: list[Tensor], ids: Tensor | None, columns: tuple[int, ...], dense: Tensor | None,
        spec: EmbeddingSpec, refusals: _Refusals | None,
    ) -> Tensor:  # fmt: skip
        """:meth:`run`, described anew."""
        if ids is not None:
            bad = None if refusals is None else refusals.bad
            row = embedding_bag_fwd(tables, ids, columns, dense, spec, self.dtype, bad)
            if refusals is not None:
                refusals.post()
        else:
            assert dense is not None
            row = dense.to(self.dtype)
        if len(row) == 0:
            return torch.empty(0, len(self._outputs), dtype=torch.float32, device=row.device)
        matrices, logits = {0: row}, dict[int, Tensor]()
        for stage in self._runs:
            stage(matrices, logits)
        if refusals is not None and ids is not None:
            refusals.check(ids, columns, spec)
        if self._in_kernel:
            return logits[-1]
        made = []
        for kind, a, b in self._outputs:
            one = logits[a].float()
            if kind != "logit":
                one = torch.sigmoid(one)
            made.append(one * torch.sigmoid(logits[b].float()) if kind == "product" else one)
        return torch.stack(made, dim=1)


def _staged(layer: PackedLayer, towers: PackedTowers | None) -> list[Tensor] | None:
    """The weights for CUDA C++ on Hopper; None where that is not here, or does not take such a layer."""
    device = layer.arguments()["W2_ptr"].device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0) or libraries.why_no_cuda():
        return None
    if not hasattr(torch.ops.fastmtl_cuda, "folded"):  # it was built for other GPUs
        return None
    return None if towers is None or why_not_staged(layer, towers) else list(stages_of(layer, towers))


def _fits(x: Tensor) -> bool:
    """Whether a layer's input ``[1, B, I]`` is read by tiles: there are enough, and 16 bytes are loaded at a time."""
    enough = 2 * cdiv(x.shape[1], _TILE) > configs.PROGRAMS
    return enough and x.stride(1) % 8 == 0 and x.stride(2) == 1 and x.data_ptr() % 16 == 0


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """The same for tensors that a kernel is compiled and launched for alike."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16


def _gathered(stage: _Stage, matrices: dict[int, Tensor]) -> Tensor:
    """A stage's inputs ``[N, B, I]``: as they lie, where they lie one behind the other."""
    found = [matrices[number] for number in stage.inputs]
    first = found[0]
    if len(found) == 1:
        return first.unsqueeze(0)
    step = found[1].storage_offset() - first.storage_offset()
    in_line = all(
        one.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and one.stride() == first.stride()
        and one.storage_offset() == first.storage_offset() + n * step
        for n, one in enumerate(found)
    )
    if not in_line or step <= 0:
        return torch.stack(found)
    return first.as_strided((len(found), *first.shape), (step, *first.stride()))


def _reads_one_by_one(towers: _Stage, gates: _Stage, stages: list[_Stage]) -> bool:
    """Whether ``towers`` can follow in the same kernel: one for each gate, whose mixtures nobody else reads."""
    n = len(gates.spec.gates)
    others = [number for stage in stages if stage is not towers for number in stage.inputs]
    return (
        n > 0
        and towers.spec.output_layer
        and why_not(towers.spec) is None
        and max(towers.spec.dims) <= 128
        and towers.inputs == gates.results
        and towers.spec.expert_input == tuple(range(n))
        and not set(others) & set(gates.results)
    )
