"""Whole models packed for prediction on the CPU: what csrc/core/inference.h is told, and the handle of what it made."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import ExpertGateParams, ExpertGateSpec
from . import native

#: Kinds of outputs, in the order of OutputKind.
_OUTPUTS = ("logit", "probability", "product")


class Program:
    """A model as stages over numbered matrices of some rows; matrix 0 is the looked-up row.

    Args:
        width: columns of a looked-up row.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._stages: list[list[int]] = []
        self._outputs: list[tuple[int, int, int]] = []
        self._learned: list[Tensor] = []
        self._running: list[Tensor] = []
        self._small: list[tuple[int, Tensor]] = []
        self._matrices, self._logits = 1, 0
        #: Whether only hidden layers and gates read matrix 0, so that tables may be folded into them.
        self.folds = True

    def fold(self, tables: Sequence[tuple[int, Tensor]]) -> None:
        """Fold tables of few rows into the layers that read matrix 0 (where :attr:`folds`): what a
        layer makes of each of their rows is computed once. Their columns are no longer looked up.

        Args:
            tables: ascending, the first column of matrix 0 that a row fills, and the table ``[rows, D]``.
        """
        self._small = list(tables)

    def layer(self, spec: ExpertGateSpec, params: ExpertGateParams, inputs: Sequence[int]) -> list[int]:
        """A layer of experts and gates on the matrices ``inputs``, one for each of the spec's.

        Returns:
            The numbers of its matrices (one a gate, without gates one an expert), with an output layer those of its
            logits, one an expert.
        """
        plan = native.layer_numbers(spec)
        stage = [1, len(plan), *plan, *inputs]
        self.folds &= bool(spec.dims) or 0 not in inputs
        if spec.output_layer:
            results = list(range(self._logits, self._logits + spec.n_experts))
            self._logits += spec.n_experts
            stage += results
        else:
            results = self._new_matrices(len(spec.gates) or spec.n_experts)
        self._stages.append(stage)
        self._learned += params.learned()
        self._running += params.running()
        return results

    def transfer(self, qkv: Tensor, own: int, info: int) -> int:
        """AITM's attention with the projections ``[3 D, D]``; returns its matrix."""
        self._stages.append([0, qkv.shape[1], own, info])
        self.folds &= own > 0 and info > 0
        self._learned.append(qkv)
        return self._new_matrices(1)[0]

    def _new_matrices(self, n: int) -> list[int]:
        self._matrices += n
        return list(range(self._matrices - n, self._matrices))

    def output(self, kind: str, logit: int, other: int = 0) -> None:
        """The next column of the predictions: a ``"logit"``, its ``"probability"``, or the ``"product"`` of two."""
        self._outputs.append((_OUTPUTS.index(kind), logit, other))

    def pack(self, bf16: bool) -> PackedProgram:
        """Fold the batch normalisations and pack the weights, in fp32 or rounded to bf16."""
        return PackedProgram(torch.ops.fastmtl.inference_new.default(*self.arguments(), bf16))

    def arguments(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The plan as csrc/cpu/inference.cpp reads it, and the tensors that it speaks of."""
        small = [(column, table.shape[1], table.shape[0]) for column, table in self._small]
        head = [self.width, self._logits, len(self._outputs), len(self._stages), len(small)]
        plan = [*head, *(n for entries in (self._outputs, small, self._stages) for entry in entries for n in entry)]
        return torch.tensor(plan, dtype=torch.int64), [*(t for _, t in self._small), *self._learned], self._running


class PackedProgram:
    """A packed model: constant, and safe to run from many threads at once. Made by :meth:`Program.pack`."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._run = torch.ops.fastmtl.inference_run.default
        weakref.finalize(self, torch.ops.fastmtl.inference_free.default, number)

    def run(
        self,
        tables: Sequence[Tensor],
        ids: Sequence[Tensor],
        dense: Sequence[Tensor],
        plan: Tensor,
        small: Tensor | None = None,
    ) -> Tensor:
        """Predict a batch.

        Args:
            tables: the weights that the bags read, as for :func:`fastmtl.ops.embedding_bag`.
            ids: integer columns ``[B]`` or ``[B, L]``, which side by side are the bags' id columns.
            dense: floating-point columns likewise.
            plan: the lookup's, see :func:`fastmtl.backends.native.bag_plan`; without the bags of folded tables, and
                its output without their columns.
            small: the bags of folded tables, in their order; None where nothing was folded.

        Returns:
            Predictions ``[B, T]`` float32.

        Raises:
            RuntimeError: input that is refused: ids outside their vocabulary, dense values that are not finite,
                columns of another dtype, length or number. It does not say what; the ordinary way does.
        """
        return self._run(self._number, tables, ids, dense, plan, small)
