"""More than 2^31 elements: tables, outputs and gradients are indexed by 64 bits.

A table is memory that was never touched, so that only the rows that are looked up take space; outputs and dense
gradients are written in full (8.6 GB) and are tried where so much memory is free.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fastmtl.backend import use_backend
from fastmtl.backends import native
from fastmtl.ops import embedding_bag
from fastmtl.spec import Bag, EmbeddingSpec

OVER = 2**31 + 1
#: Bytes that must be free beyond what a case writes.
MARGIN = 3e9


def available_bytes() -> int:
    """Memory that a process could have."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def check_table(dim: int) -> None:
    """Lookups and sparse gradients of the first and the last rows of a table of more than 2^31 elements."""
    rows = -(-OVER // dim)
    weight = torch.empty(rows, dim)
    looked = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1])
    weight[looked] = torch.arange(5.0 * dim).view(5, dim)
    spec = EmbeddingSpec((Bag("item", 0, 0, rows, dim),))
    ids = looked.repeat(40).unsqueeze(1)
    (index,) = native.embedding_bag_index(ids, (0, 1), spec, [weight.shape], [True])
    assert index.rows.tolist() == looked.tolist()
    with use_backend("native"):
        out = embedding_bag([weight], ids, (0, 1), None, spec)
    assert torch.equal(out, torch.arange(5.0 * dim).view(5, dim).repeat(40, 1))
    grad = torch.arange(float(len(ids) * dim)).view(-1, dim) % 97
    ((got, values),) = native.embedding_bag_bwd_sparse(grad, ids, (0, 1), spec, [weight.shape], [index])
    assert torch.equal(got, looked)
    assert torch.equal(values, grad.view(40, 5, dim).sum(0))


def check_output() -> None:
    """B * T * D > 2^31: the last rows of an output of 2^20 + 8 rows of 2049."""
    batch, dim = 2**20 + 8, 2049
    weight = torch.arange(7.0 * dim).view(7, dim)
    ids = (torch.arange(batch) % 7).unsqueeze(1)
    with use_backend("native"):
        out = embedding_bag([weight], ids, (0, 1), None, EmbeddingSpec((Bag("item", 0, 0, 7, dim),)))
    assert out.numel() > OVER
    for row in (0, 1, batch // 2, batch - 2, batch - 1):
        assert torch.equal(out[row], weight[row % 7])


def check_dense_gradient() -> None:
    """The dense gradient of a table of more than 2^31 elements: zero but in the last row and the first."""
    spec = EmbeddingSpec((Bag("item", 0, 0, OVER, 1),))
    ids = torch.tensor([[0], [OVER - 1], [OVER - 1]])
    (grad,) = native.embedding_bag_bwd(
        torch.tensor([[1.0], [2.0], [3.0]]), ids, (0, 1), spec, [torch.Size((OVER, 1))], [True]
    )
    assert grad is not None
    assert grad[0] == 1
    assert grad[-1] == 5
    assert torch.count_nonzero(grad) == 2


def soak(count: int, seed: int) -> str:
    """All cases that memory allows; ``count`` and ``seed`` play no part, the cases are these."""
    del count, seed
    for dim in (1, 16, 1025):
        check_table(dim)
    done = ["tables of 2^31 + elements at widths 1, 16 and 1025: lookups and sparse gradients exact at the last row"]
    for name, check, needed in (
        ("output of 2^31 + elements", check_output, 4 * OVER),
        ("dense gradient of 2^31 + elements", check_dense_gradient, 4 * OVER),
    ):
        if available_bytes() < needed + MARGIN:
            done.append(f"NOT RUN for want of {(needed + MARGIN) / 1e9:.0f} GB: {name}")
        else:
            check()
            done.append(f"{name} exact")
    return "; ".join(done)
