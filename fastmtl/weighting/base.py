"""The base of the strategies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing import Any as MTLModel  # a fastmtl model; weighting does not import models


class Strategy:
    """Turns the losses of the tasks into gradients.

    Subclasses set up what they need of the model in :meth:`attach` and fill the parameters' ``.grad`` in
    :meth:`backward`.
    """

    def attach(self, model: MTLModel, task_types: list[str]) -> None:
        """Called once, when the model has its parameters and before the optimizer is made."""
        self.model = model
        self.task_types = task_types
        tasks = model.SUMMED_TASKS
        #: The outputs that are trained, and the factor of their summed losses.
        self.tasks = list(range(len(task_types))) if tasks is None else list(tasks)
        self.factor = 1 / len(self.tasks) if tasks is None else 1.0
        self._numbers = torch.tensor(self.tasks)
        self._there: dict[tuple[str, torch.device], Tensor] = {}

    def backward(self, losses: Tensor, penalty: Tensor | float) -> None:
        """Fill ``.grad`` of the parameters (which are None or zero).

        Args:
            losses: ``[T]``, with their graph.
            penalty: the regularisation loss, added to whatever is minimised.
        """
        (self.total(losses) + penalty).backward()

    def total(self, losses: Tensor) -> Tensor:
        """The one loss to minimise."""
        raise NotImplementedError

    def factors(self) -> Tensor | None:
        """``[T]``, where :meth:`total` is a sum of the losses with factors that are known before them, and
        :meth:`backward` the base's; those of the next batch where there are :meth:`weights`."""
        return None

    @torch.no_grad()
    def give_own_gradients(self, losses: Tensor) -> None:
        """Fill ``.grad`` of :meth:`weights`, where the model's gradients were taken with :meth:`factors`."""

    def after_step(self) -> None:
        """Called after the optimizer's step."""

    def weights(self) -> nn.Parameter | None:
        """Learned loss weights ``[T]``, for logs."""
        return None

    def spread(self, factors: Tensor) -> Tensor:
        """Factors of the trained outputs to ``[T]``; the others' are zero."""
        return torch.zeros(len(self.task_types)).index_copy(0, torch.tensor(self.tasks), factors)

    def trained(self, values: Tensor) -> Tensor:
        """The entries of ``values [T]`` that belong to trained outputs."""
        if len(self.tasks) == len(values):
            return values
        return values.index_select(0, self.on(values.device, "tasks", self._numbers))

    def on(self, device: torch.device, name: str, constant: Tensor) -> Tensor:
        """A constant on ``device``, copied there once: a copy in every step would make the host wait for a GPU."""
        if (name, device) not in self._there:
            self._there[name, device] = constant.to(device)
        return self._there[name, device]
