"""A call's launches made again for other tensors of the same kind, without what Triton and we find out for each anew.

A prediction of a few thousand rows takes the GPU less time than the host takes to describe its launches: some fifty
arguments each, looked at one by one to find the compiled kernel. Where two calls differ in addresses alone, their
kernels are the same: the second puts its own addresses into the arguments of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import Called, Launched

#: The arguments that kernels of inference write to: an intermediate result is written before it is read.
WRITTEN = ("Out_ptr", "Y_ptr", "H_ptr")
#: Where intermediate results begin in the memory that a call has for them: as aligned as torch's own.
_ALIGN = 512


class _Place(NamedTuple):
    """An argument that each call has anew: such a tensor, ``offset`` bytes behind the beginning of ``source``."""

    position: int
    source: str
    offset: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self, source: Tensor) -> Tensor:
        """The tensor itself, which the interpreter wants."""
        if source.dtype is not self.dtype:  # memory for intermediate results
            source = source.view(self.dtype)
        return source.as_strided(self.shape, self.stride, source.storage_offset() + self.offset // self.dtype.itemsize)


class _Again(NamedTuple):
    """One launch: what makes it, its arguments in their order, those that change, and whether it takes tensors by their
    addresses."""

    start: Callable[..., Any]
    arguments: list[Any]
    places: tuple[_Place, ...]
    by_address: bool


#: The name of the memory for intermediate results among a call's tensors.
_ROOM = ""


class Replay:
    """Launches to be made again.

    Args:
        launches: of a call, in order.
        given: the call's own tensors by name, which each call brings anew: what is read, and the result.
        constants: what all calls read; kept alive here.

    Raises:
        ValueError: something was computed by other means than these launches.
    """

    def __init__(
        self, launches: Sequence[Launched | Called], given: Mapping[str, Tensor], constants: Sequence[Tensor]
    ) -> None:
        self._kept = list(constants)
        self._device = next(iter(given.values())).device
        known = {_storage(tensor): (name, tensor.data_ptr()) for name, tensor in given.items()}
        still = {_storage(tensor) for tensor in constants}
        n_bytes = 0
        self._launches: list[_Again] = []
        for one in launches:
            names = one.kernel.arg_names
            arguments, places = [one.arguments[name] for name in names], []
            for position, (name, value) in enumerate(zip(names, arguments, strict=True)):
                if not isinstance(value, Tensor):
                    continue
                storage = _storage(value)
                if storage in still:
                    if one.compiled is not None:
                        arguments[position] = value.data_ptr()  # which spares the launch a look at the tensor
                    continue
                if storage not in known:
                    if name not in WRITTEN:
                        raise ValueError(f"{one.kernel.__name__}: {name} was made by other means than these launches")
                    known[storage] = _ROOM, storage - n_bytes
                    n_bytes += -(-value.untyped_storage().nbytes() // _ALIGN) * _ALIGN
                source, start = known[storage]
                places.append(
                    _Place(position, source, value.data_ptr() - start, value.dtype, value.shape, value.stride())
                )
            self._launches.append(_Again(one.again(), arguments, tuple(places), one.compiled is not None))
        self._n_bytes = n_bytes

    def __call__(self, given: Mapping[str, Tensor], behind: Mapping[int, Callable[[], None]] | None = None) -> None:
        """Make the launches.

        Args:
            given: tensors of the shapes, strides, dtypes and alignment of those at first, by the same names.
            behind: what is to be done behind the launch of that number.
        """
        tensors = dict(given)
        if self._n_bytes:
            tensors[_ROOM] = torch.empty(self._n_bytes, dtype=torch.uint8, device=self._device)
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        for number, (start, arguments, places, by_address) in enumerate(self._launches):
            mine = arguments.copy()  # another thread may be here, too
            for place in places:
                if by_address:
                    mine[place.position] = addresses[place.source] + place.offset
                else:
                    mine[place.position] = place.view(tensors[place.source])
            start(*mine)
            if behind is not None and number in behind:
                behind[number]()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
