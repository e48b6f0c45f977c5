"""What a CUDA graph does, on the CPU: a step's operations with the tensors they had, done again without its Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmtl.backends.triton import launch as launching


class Tape(TorchDispatchMode):
    """A :class:`fastmtl.trainers.recorders.Recorder`: numbers that come from Python stay what they were when recorded,
    results go where they went then, and a number that is read from a tensor, or made into one, can't be recorded.

    Recording runs the work once; the first replay then is that run.
    """

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[Callable[[], Any]] = []

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """See the protocol."""
        self._steps = []
        launching.recorder = self._launch
        try:
            with self:
                work()
        finally:
            launching.recorder = None
        steps, first = self._steps, [True]

        def replay() -> None:
            if first:
                first.clear()
                return
            with torch.no_grad():
                for step in steps:
                    step()

        return replay

    def _launch(self, kernel: Any, grid: tuple[int, ...], warps: Any, arguments: dict[str, Any]) -> None:
        def step() -> None:
            with torch._C._DisableTorchDispatch():
                kernel[grid](**arguments, **warps.options())

        step()
        self._steps.append(step)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number was read from a tensor while a step was recorded")
        if func is torch.ops.aten.lift_fresh.default:
            raise RuntimeError("a tensor was made of Python's numbers while a step was recorded")
        out = func(*args, **kwargs)
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        fresh = [t for t in results if t.untyped_storage().data_ptr() not in given]
        writes = func._schema.is_mutable
        if writes or (fresh and "empty" not in func._schema.name):

            def step() -> None:
                again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
                if not writes:
                    for target, value in zip(results, again, strict=True):
                        target.copy_(value)

            self._steps.append(step)
        return out
