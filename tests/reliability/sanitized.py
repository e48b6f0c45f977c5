"""Loads the sanitizers' build in place of fastmtl's library: a plugin of pytest, or `python -m` around the fuzzer."""

import ctypes
import sys

from reliability.sanitize import use_sanitized_library

use_sanitized_library()


def forbidden() -> None:
    """Look up with an id that the address sanitizer is told nobody may read: ends the process."""
    import torch

    from fastmtl.backend import use_backend
    from fastmtl.ops import embedding_bag
    from fastmtl.spec import Bag, EmbeddingSpec

    ids = torch.zeros(64, 1, dtype=torch.long)
    spec = EmbeddingSpec((Bag("item", 0, 0, 5, 3),))
    with use_backend("native"):
        embedding_bag([torch.ones(5, 3)], ids, (0, 1), None, spec)
        ctypes.CDLL(None).__asan_poison_memory_region(ctypes.c_void_p(ids[32].data_ptr()), ctypes.c_size_t(8))
        embedding_bag([torch.ones(5, 3)], ids, (0, 1), None, spec)


if __name__ == "__main__":
    from reliability import fuzz

    if sys.argv[1:] == ["forbidden"]:
        forbidden()
    else:
        fuzz.main(*map(int, sys.argv[1:4]), sys.argv[4])
