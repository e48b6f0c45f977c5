"""More than 2^31 elements: tables, outputs and gradients are indexed by 64 bits.

On the CPU a table is memory that was never touched, so that only the rows that are looked up take space; outputs and
dense gradients are written in full (8.6 GB) and are tried where so much memory is free.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from devices import DEVICE, KERNELS, home, place, run_on
from native.layers import new_params

from fastmtl.backend import TABLE
from fastmtl.backends import native, updates
from fastmtl.ops import embedding_bag, expert_gate
from fastmtl.spec import Bag, EmbeddingSpec, ExpertGateSpec

OVER = 2**31 + 1
#: Bytes that must be free beyond what a case writes.
MARGIN = 3e9


def available_bytes() -> int:
    """Memory that a process could have where the tensors are."""
    if DEVICE.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def check_table(dim: int, backend: str = "native") -> None:
    """Lookups, sparse gradients and, on a GPU, steps of the first and the last rows of a table of 2^31 + elements."""
    rows, where = -(-OVER // dim), home(backend)
    module: Any = TABLE["embedding_bag"][backend]
    weight = torch.empty(rows, dim, device=where)
    looked = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1])
    weight[looked.to(where)] = torch.arange(5.0 * dim, device=where).view(5, dim)
    spec = EmbeddingSpec((Bag("item", 0, 0, rows, dim),))
    ids = looked.repeat(40).unsqueeze(1)
    out = run_on(backend, embedding_bag, [weight], ids, (0, 1), None, spec)
    assert torch.equal(out, torch.arange(5.0 * dim).view(5, dim).repeat(40, 1))
    grad = torch.arange(float(len(ids) * dim)).view(-1, dim) % 97
    summed = grad.view(40, 5, dim).sum(0)
    arguments = (grad.to(where), ids.to(where), (0, 1), spec, [weight.shape])
    if backend == "native":
        (index,) = native.embedding_bag_index(ids, (0, 1), spec, [weight.shape], [True])
        assert index.rows.tolist() == looked.tolist()
        ((got, values),) = native.embedding_bag_bwd_sparse(*arguments, [index])
    else:
        ((listed, unsorted),) = module.embedding_bag_bwd_sparse(*arguments, [True])
        live = (listed < rows).nonzero()[:, 0]
        got, order = listed[live].cpu().sort()
        values = unsorted[live].cpu()[order]
    assert torch.equal(got, looked)
    assert torch.equal(values, summed)
    if backend != "native":
        last = torch.zeros(rows, dtype=torch.int32, device=where)
        now = torch.full((1,), 3, dtype=torch.int32, device=where)
        step = torch.zeros(updates.FIELDS, device=where)
        step[-1] = -1.0  # p - gradient
        update = updates.Update(weight, [], last, updates.RULES.index("sgd"), step, now)
        module.embedding_bag_bwd_step(*arguments[:4], [update])
        moved = weight[looked.to(where)].cpu()
        assert torch.equal(moved, torch.arange(5.0 * dim).view(5, dim) - summed)
        assert last[looked.to(where)].tolist() == [3] * 5


def check_output(backend: str = "native") -> None:
    """B * T * D > 2^31: the last rows of an output of 2^20 + 8 rows of 2049."""
    batch, dim = 2**20 + 8, 2049
    weight = torch.arange(7.0 * dim, device=home(backend)).view(7, dim)
    ids = (torch.arange(batch, device=home(backend)) % 7).unsqueeze(1)
    spec = EmbeddingSpec((Bag("item", 0, 0, 7, dim),))
    out = TABLE["embedding_bag"][backend].embedding_bag_fwd([weight], ids, (0, 1), None, spec)
    assert out.numel() > OVER
    for row in (0, 1, batch // 2, batch - 2, batch - 1):
        assert torch.equal(out[row], weight[row % 7])


def check_layer(backend: str) -> None:
    """The same of a layer: two experts of 1025, whose last rows are what they are in a batch of their own."""
    batch, spec = 2**20 + 8, ExpertGateSpec(3, (0, 0), (1025,), "sigmoid")
    generator = torch.Generator().manual_seed(0)
    params = place(new_params(spec, generator), home(backend))
    x = torch.randn(1, batch, 3, generator=generator).to(home(backend))
    with torch.no_grad():
        out = TABLE["expert_gate"][backend].expert_gate_fwd(x, params, spec, False)[0]
        assert out.numel() > OVER
        last = run_on("eager", expert_gate, x[:, -9:].cpu(), place(params, torch.device("cpu")), spec, False)
    torch.testing.assert_close(out[:, -9:].cpu(), last, rtol=1e-5, atol=1e-6)


def check_dense_gradient(backend: str = "native") -> None:
    """The dense gradient of a table of more than 2^31 elements: zero but in the last row and the first."""
    spec = EmbeddingSpec((Bag("item", 0, 0, OVER, 1),))
    ids = torch.tensor([[0], [OVER - 1], [OVER - 1]], device=home(backend))
    out = torch.tensor([[1.0], [2.0], [3.0]], device=home(backend))
    module: Any = TABLE["embedding_bag"][backend]
    (grad,) = module.embedding_bag_bwd(out, ids, (0, 1), spec, [torch.Size((OVER, 1))], [True])
    assert grad is not None
    assert grad[0] == 1
    assert grad[-1] == 5
    assert torch.count_nonzero(grad) == 2


def soak(count: int, seed: int) -> str:
    """All cases that memory allows; ``count`` and ``seed`` play no part, the cases are these."""
    del count, seed
    return "; ".join(f"{backend}: {_soak(backend)}" for backend in KERNELS)


def _soak(backend: str) -> str:
    on_gpu = backend != "native"
    cases: list[tuple[str, Any, float]] = [
        (f"table of 2^31 + elements at width {dim}", lambda dim=dim: check_table(dim, backend), table)
        for dim, table in ((1, 24 * OVER), (16, 8 * OVER), (1025, 8 * OVER))
    ]
    cases += [
        ("output of 2^31 + elements", lambda: check_output(backend), 4 * OVER),
        ("dense gradient of 2^31 + elements", lambda: check_dense_gradient(backend), 8 * OVER if on_gpu else 4 * OVER),
    ]
    if on_gpu:
        cases.append(("layer of 2^31 + activations", lambda: check_layer(backend), 12 * OVER))
    done = []
    for name, check, needed in cases:
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        in_full = on_gpu or not name.startswith("table")
        if in_full and available_bytes() < needed + MARGIN:
            done.append(f"NOT RUN for want of {(needed + MARGIN) / 1e9:.0f} GB: {name}")
        else:
            check()
            done.append(f"{name} exact")
    return ", ".join(done)
