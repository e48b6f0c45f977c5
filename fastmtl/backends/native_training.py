"""Steps of a small model on the CPU, each as one call: what csrc/cpu/training.cpp is told, and its handle.

A small model's step is short enough for its bookkeeping to count: a dozen ops, and the optimizer's checks of every
parameter, were a third of census' step (docs/performance.md, "One call a step").
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import EmbeddingSpec, ExpertGateParams, ExpertGateSpec
from . import eager, native
from .native_folding import Folding


class RuleStep(NamedTuple):
    """Parameters that an optimizer moves together.

    Args:
        params: some of the program's.
        states: the first state of each, then the second of each, as the rule has them.
        counters: their step numbers, where the rule counts.
        rule: its number in ``fastmtl.optim.rules``.
    """

    params: Sequence[Tensor]
    states: list[Tensor]
    counters: list[Tensor]
    rule: int


class TrainingProgram:
    """A chain of layers behind one lookup, and the optimizer of their parameters.

    Args:
        weights: the tables, as for :func:`fastmtl.ops.embedding_bag`; all get a gradient that ask for one.
        spec, columns: the lookup, without bags that take a maximum.
        folding: how small tables are folded into the first layer; None: none are.
        layers: the last of them makes the tasks' logits.
        batch_counters: ``[n]`` int64 each, to be raised by 1 in a batch.
        is_classification: as for :func:`fastmtl.backends.native.task_losses`.
        x_columns: of so many of the first layer's columns a gradient is wanted; -1: no table is trained.
        rules: which parameters move how.
        bf16: whether products are of bf16 operands.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        spec: EmbeddingSpec,
        columns: tuple[int, ...],
        folding: Folding | None,
        layers: Sequence[tuple[ExpertGateParams, ExpertGateSpec]],
        batch_counters: list[Tensor],
        is_classification: Tensor,
        x_columns: int,
        rules: Sequence[RuleStep],
        bf16: bool,
    ) -> None:
        self._spec, self._columns = spec, columns
        trained = [x_columns >= 0 and weight.requires_grad for weight in weights]
        lookup: tuple[Any, ...] = native.bag_plan(spec, columns), spec.width(columns)
        small: tuple[Any, ...] = None, None, 0, None, None, False
        if folding is not None:
            lookup, small, trained = folding.for_program([weight.shape for weight in weights], trained)
        wanted = [n for w, t in zip(weights, trained, strict=True) for n in (len(w) if t else -1 - len(w), w.shape[1])]
        learned = [p for params, _ in layers for p in params.learned()]
        running = [p for params, _ in layers for p in params.running()]
        self._dropouts = [spec.dropout for _, spec in layers]
        self._written = [p for rule in rules for p in rule.params] + running + batch_counters
        self._number = torch.ops.fastmtl.training_new.default(
            list(weights), *lookup, wanted, *small, learned, running,
            [native.layer_plan(spec) for _, spec in layers], batch_counters, self._dropouts, bf16,
            is_classification, x_columns,
        )  # fmt: skip
        weakref.finalize(self, torch.ops.fastmtl.training_free.default, self._number)
        place = {id(p): i for i, p in enumerate([*learned, *weights])}
        self._trained = [p for rule in rules for p in rule.params]
        self._at = [place[id(p)] for p in self._trained]
        for rule in rules:
            torch.ops.fastmtl.training_add_rule.default(
                self._number, [place[id(p)] for p in rule.params], rule.states, rule.counters, rule.rule
            )
        self._step = torch.ops.fastmtl.training_step.default
        #: Whether there was a step.
        self.has_run = False

    def step(
        self,
        ids: Tensor,
        dense: Tensor | None,
        labels: Tensor,
        factors: Tensor,
        numbers: list[float],
        counts: list[float],
    ) -> tuple[Tensor, Tensor, bool]:
        """Train on a batch.

        Args:
            ids, dense: as for :func:`fastmtl.ops.embedding_bag`.
            labels: ``[B, T]`` float32; NaN where a label is missing.
            factors: ``[T]`` float32, of each loss in the sum.
            numbers: of each rule the numbers of its step (``fastmtl.optim.rules.FIELDS``), one behind the other.
            counts: of each rule the number of its step, from 1.

        Returns:
            Losses ``[T]``, logits ``[B, T]``, and whether the optimizer's step was taken: not where a loss is NaN, or
            a counter does not stand at its count - 1.

        Raises:
            BadIdError: an id outside its vocabulary.
            RuntimeError: other input that is refused, dense values that are not finite among it.
        """
        seeds = native.dropout_seeds(self._dropouts)
        try:
            losses, logits, is_done = self._step(self._number, ids, dense, labels, factors, seeds, numbers, counts)
        except RuntimeError:
            eager.raise_bad_id(ids, self._columns, self._spec)
            raise
        self.has_run = True
        torch.autograd.graph.increment_version(self._written)
        return losses, logits, is_done

    def give_gradients(self) -> None:
        """Put the last step's gradients into ``.grad`` of the parameters."""
        grads = torch.ops.fastmtl.training_gradients.default(self._number, self._at)
        for p, grad in zip(self._trained, grads, strict=True):
            p.grad = grad
