"""Where the tests' models and batches lie: on the CPU, or where FASTMTL_TEST_DEVICE says.

``cuda``: on the GPU, on each backend for it. ``elsewhere``: on a device that is made up (:class:`Elsewhere`), to see
without a GPU that models, trainers and these tests move what they must.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

from fastmtl import backend as backends
from fastmtl.backends import triton

NAME = os.environ.get("FASTMTL_TEST_DEVICE", "cpu")
#: A tensor there knows no shape of "cuda"; "meta" is the one name that every build of torch takes.
MADE_UP = "meta"
DEVICE = torch.device(MADE_UP if NAME == "elsewhere" else NAME)


def backends_on(device: str) -> list[str]:
    """The backends for tensors there, of those that can run on this machine."""
    where = {**backends.DEVICES, **({"triton": "cpu"} if triton.interpreting() else {})}
    return [name for name in backends.available() if where.get(name, device) == device]


BACKENDS = backends_on(DEVICE.type)
#: Those with kernels of their own, which eager is to judge.
KERNELS = [name for name in BACKENDS if name != "eager"]


def place(x: Any, where: torch.device = DEVICE) -> Any:
    """Tensors, models, or what holds them, on the device under test; a tensor's graph stays with it."""
    if isinstance(x, Mapping):
        return {name: place(value, where) for name, value in x.items()}
    if isinstance(x, (list, tuple)):
        return getattr(type(x), "_make", type(x))([place(value, where) for value in x])
    return x.to(where) if isinstance(x, (Tensor, nn.Module)) else x


def fetch(x: Any) -> Any:
    """The same on the CPU."""
    return place(x, torch.device("cpu"))


def call(work: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """``work`` on the device under test, or where its parameters are; what it gives is on the CPU."""
    own = next(work.parameters(), None) if isinstance(work, nn.Module) else None
    where = DEVICE if own is None else own.device
    return fetch(work(*place(args, where), **place(keywords, where)))


def home(name: str) -> torch.device:
    """Where a backend of :data:`KERNELS` has its tensors; eager, which judges them, has its own on the CPU."""
    return DEVICE if name in KERNELS else torch.device("cpu")


def run_on(name: str, work: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """``work`` on a backend at its :func:`home`; what it gives is on the CPU."""
    with backends.use_backend(name):
        return fetch(work(*place(args, home(name)), **place(keywords, home(name))))


# ------------------------------------------------------------------------------------------------- a made-up device


class Elsewhere(Tensor):
    """A tensor that says it is on another device; its numbers are those of ``inner``, on the CPU.

    An op takes tensors of one device only, as on a GPU, but for scalars and copies from one to the other.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=MADE_UP,
        )  # fmt: skip
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


#: What may take tensors of both devices: copies, and indices, which may lie on the CPU.
_ACROSS = (
    "aten::copy_",
    "aten::_foreach_copy_",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_index_put_impl_",
)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    assert all(isinstance(t, Elsewhere) or t.device.type != MADE_UP for t in tensors), f"{func}: numbers were lost"
    there = any(isinstance(t, Elsewhere) for t in tensors)
    goes_there, inside = there, kwargs
    if kwargs.get("device") is not None:
        goes_there = torch.device(kwargs["device"]).type == MADE_UP
        inside = {**kwargs, "device": "cpu"}
    elif there and func._schema.name not in _ACROSS and any(t.ndim and not isinstance(t, Elsewhere) for t in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
    found = func(*tree_map_only(Elsewhere, lambda t: t.inner, args), **tree_map_only(Elsewhere, _inner, inside))
    if not goes_there:
        return found.clone() if isinstance(found, Tensor) and there and kwargs.get("device") is not None else found
    found = tree_map_only(Tensor, lambda t: t if isinstance(t, Elsewhere) else Elsewhere(t), found)
    return return_and_correct_aliasing(func, args, kwargs, found) if there else found


def _inner(tensor: Elsewhere) -> Tensor:
    return tensor.inner


class _Dispatch(TorchDispatchMode):
    """Ops that are told to make their tensors elsewhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        tensors = tree_flatten((args, kwargs))[0]
        if any(isinstance(t, Elsewhere) for t in tensors) or (device and torch.device(device).type == MADE_UP):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _listed(index: list[Any]) -> Tensor:
    return torch.tensor(index) if index else torch.tensor(index, dtype=torch.int64)


class _Functions(TorchFunctionMode):
    """What torch makes of numbers before an op sees them: on "meta" they are lost."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Elsewhere):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(_listed(i) if isinstance(i, list) else i for i in index), *args[2:])
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == MADE_UP:
            del kwargs["device"]
            return func(*args, **kwargs).to(MADE_UP)
        return func(*args, **kwargs)


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    """While this lasts the made-up device is there, if it is the one under test."""
    if NAME != "elsewhere":
        yield
        return
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter stays itself when its model moves
    try:
        with _Dispatch(), _Functions():
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
