"""The steps of an epoch without autograd; on the CPU each one call of the native library, where that is possible."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .. import optim
from ..backends.native_training import RuleStep, TrainingProgram
from ..errors import BadIdError
from ..optim.dense import Batch
from ..optim.rules import step_numbers
from ..weighting import Strategy
from .evaluation import labels_of, to_device
from .native_gradients import ChainGradients

if TYPE_CHECKING:
    from .mtl_trainer import MTLTrainer


_OWN = (optim.Adam, optim.AdamW, optim.SGD, optim.Adagrad)


class _AtOnce(NamedTuple):
    """A program, and what must be as it was when it was made."""

    program: TrainingProgram
    least_rows: int
    columns: tuple[int, ...]
    state: Any  # the optimizer's
    rules: list[tuple[dict[str, Any], Batch]]
    others: list[Batch]  # of each rule the loss weights, which are no part of the program

    def others_are_ready(self) -> bool:
        """Whether their counters stand where their rules do."""
        return all(float(counter) == part.number[0] for part in self.others for counter in part.counters)


class ChainSteps:
    """Trains on batch after batch, by :class:`ChainGradients` and the trainer's optimizer.

    Gradients and update are one call from the second step on, where the optimizer is fastmtl's own, its tables are
    small and nobody watches its step. What is called then computes the same bits; ``.grad`` is filled by :meth:`close`.

    Args:
        trainer: whose model is trained.
        gradients: of this model.
    """

    def __init__(self, trainer: MTLTrainer, gradients: ChainGradients) -> None:
        self._trainer, self._gradients = trainer, gradients
        self._at_once: _AtOnce | None = None
        self._may_be_at_once = self._is_undisturbed()

    def __call__(self, x: Mapping[str, Tensor], y: Any) -> Tensor:
        """One update; returns the losses ``[T]``."""
        trainer, gradients = self._trainer, self._gradients
        labels = labels_of(y, gradients.model).to(trainer.device, non_blocking=True)
        x = to_device(x, trainer.device)
        if self._at_once is not None:
            losses = self._step_at_once(self._at_once, x, labels)
            if losses is not None:
                return losses
        with trainer._autocast():
            losses, logits = gradients(x, labels)
        if torch.isnan(losses).any():
            trainer._explain_nan(torch.sigmoid(logits), FloatingPointError("a loss is NaN"))
        trainer._update()
        if self._may_be_at_once and self._at_once is None:
            self._make_program(x)
        return losses

    def close(self) -> None:
        """Leave the last step's gradients in ``.grad``, as every step does that is not one call."""
        if self._at_once is not None and self._at_once.program.has_run:
            self._at_once.program.give_gradients()
        self._at_once = None

    def _is_undisturbed(self) -> bool:
        """Whether nothing but the optimizer's own step is to happen between a batch's gradients and the next batch."""
        trainer, optimizer = self._trainer, self._trainer.optimizer
        if trainer._task_rates is not None or type(trainer.strategy).after_step is not Strategy.after_step:
            return False
        # a scheduler of torch's puts a wrapper around it that notes that there was a step: the first one is seen
        step = vars(optimizer).get("step")
        hooks = _global_optimizer_pre_hooks, _global_optimizer_post_hooks
        return (
            type(optimizer) in _OWN
            and not optimizer.tables
            and (step is None or hasattr(step, "_wrapped_by_lr_sched"))
            and not any((*hooks, optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks))
        )

    def _make_program(self, x: Mapping[str, Tensor]) -> None:
        trainer, embedding = self._trainer, self._gradients.model.embedding
        ids, columns, _ = embedding.inputs(x, embedding.features)
        rules = trainer.optimizer.dense.steady()
        weights = trainer.strategy.weights()
        parts = [batch.but([] if weights is None else [weights]) for _, batch in rules]
        made = None
        if ids is not None and rules:
            moves = [RuleStep(part.params, part.states, part.counters, part.rule.number) for part, _ in parts]
            with trainer._autocast():
                made = self._gradients.program(columns, moves)
        self._may_be_at_once = made is not None
        if made is not None:
            state, others = trainer.optimizer.state, [other for _, other in parts]
            self._at_once = _AtOnce(*made, columns, state, rules, others)

    def _step_at_once(self, at_once: _AtOnce, x: Mapping[str, Tensor], labels: Tensor) -> Tensor | None:
        """None, and nothing was done: this batch, or the optimizer, is not as the program has it."""
        trainer, embedding = self._trainer, self._gradients.model.embedding
        if trainer.optimizer.state is not at_once.state or not at_once.others_are_ready():
            self.close()
            return None
        ids, columns, dense = embedding.inputs(x, embedding.features, finite=True)
        if ids is None or columns != at_once.columns or len(ids) < at_once.least_rows:
            return None
        self._gradients.begin()
        counts = [batch.number[0] + 1 for _, batch in at_once.rules]
        numbers = [
            step_numbers(batch.rule, group, count, False)
            for (group, batch), count in zip(at_once.rules, counts, strict=True)
        ]
        flat = [number for one in numbers for number in one]
        try:
            losses, logits, is_taken = at_once.program.step(ids, dense, labels, self._gradients.factors, flat, counts)
        except BadIdError:
            raise
        except RuntimeError:
            embedding.inputs(x, embedding.features)  # which says what is not finite
            raise
        trainer.strategy.give_own_gradients(losses)
        if is_taken:
            for (_, batch), other, count, one in zip(at_once.rules, at_once.others, counts, numbers, strict=True):
                batch.number[0] = count
                if other.params:
                    grads: list[Any] = [p.grad for p in other.params]
                    other.take(grads, one, count)
            return losses
        self.close()
        if torch.isnan(losses).any():
            trainer._explain_nan(torch.sigmoid(logits), FloatingPointError("a loss is NaN"))
        trainer._update()
        return losses
