"""Triton's interpreter, told once what it tells itself again in every call of a device function and in every operation.

Before a function runs it turns the names of ``triton.language`` into NumPy's: 2 ms of looking through whole modules for
what was turned long ago, in kernels that call many small functions; and what is known of a value by its type alone it
works out for each value. Without either a few epochs of training take half of the time, to the same bits.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _Kept:
    """Of names that stay as they are: nothing to restore."""

    def restore(self) -> None:
        """Nothing is."""


def quicken() -> None:
    """From now on a module's names are turned when the first of its functions runs, and stay so (this process compiles
    nothing); and types are looked at once, which their names tell apart."""
    turn, turned = interpreter._patch_lang, set[str]()

    def turn_once(fn: Any) -> _Kept:
        if fn.__module__ not in turned:
            turn(fn)
            turned.add(fn.__module__)
        return _Kept()

    make, made = tl.tensor.__init__, dict[str, dict[str, Any]]()

    def make_alike(self: Any, handle: Any, type: Any) -> None:
        if type.name not in made:
            make(self, handle, type)
            made[type.name] = {name: value for name, value in vars(self).items() if name not in ("handle", "type")}
        vars(self).update(made[type.name], handle=handle, type=type)

    find, found = interpreter._get_np_dtype, dict[str, Any]()

    def find_once(type: Any) -> Any:
        if type.name not in found:
            found[type.name] = find(type)
        return found[type.name]

    interpreter._patch_lang = turn_once
    interpreter._get_np_dtype = find_once
    tl.tensor.__init__ = make_alike
