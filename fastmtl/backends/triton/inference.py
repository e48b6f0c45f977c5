"""Whole models packed for prediction on a GPU: a lookup, then one launch a layer of experts and gates (two where a tile
of the batch does not fit a program), the towers and the sigmoid in the last one.

The program of a model is described as for the CPU (fastmtl/backends/native_inference.py). A layer that the folded
kernel does not take (more than two hidden layers, activations of whole rows) runs as in training, by its running
statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError
from ...spec import EmbeddingSpec, ExpertGateParams, ExpertGateSpec
from .embedding_bag_forward import embedding_bag_fwd
from .expert_gate_forward import expert_gate_fwd
from .folded import run_folded
from .launch import generation
from .packing import PackedLayer, PackedTowers, why_not
from .precision import of_dtype


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


class PackedProgram:
    """A packed model: constant, and safe to run from many threads at once. Made by :meth:`Program.pack`."""

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        self.dtype, self._outputs = dtype, program.outputs
        self._n_logits = sum(stage.spec.n_experts for stage in program.stages if stage.spec.output_layer)
        self._runs: list[Callable[[dict[int, Tensor], dict[int, Tensor]], None]] = []
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
        skipped = False
        for stage, follows in zip(stages, [*stages[1:], None], strict=True):
            if skipped:
                skipped = False
            elif why_not(stage.spec):
                self._runs.append(self._as_in_training(stage))
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

        def run(matrices: dict[int, Tensor], logits: dict[int, Tensor]) -> None:
            x, out = _gathered(stage, matrices), None
            if last.spec.output_layer:
                out = torch.empty(x.shape[1], last.spec.n_experts, dtype=torch.float32, device=x.device)
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
        if ids is not None:
            row = embedding_bag_fwd(tables, ids, columns, dense, spec, self.dtype)
        else:
            assert dense is not None
            row = dense.to(self.dtype)
        if len(row) == 0:
            return torch.empty(0, len(self._outputs), dtype=torch.float32, device=row.device)
        matrices, logits = {0: row}, dict[int, Tensor]()
        for stage in self._runs:
            stage(matrices, logits)
        if self._in_kernel:
            return logits[-1]
        made = []
        for kind, a, b in self._outputs:
            one = logits[a].float()
            if kind != "logit":
                one = torch.sigmoid(one)
            made.append(one * torch.sigmoid(logits[b].float()) if kind == "product" else one)
        return torch.stack(made, dim=1)


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
