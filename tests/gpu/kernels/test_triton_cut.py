"""Batches cut out of columns on the device, all blocks in one launch: torch's indexing, bit for bit."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from fastmtl import backend as backends
from fastmtl.backends import triton as backend
from fastmtl.backends.triton import configs, cut
from fastmtl.backends.triton import launch as launching
from fastmtl.data.datasets import PredictDataset, TorchDataset
from fastmtl.data.loader import ColumnLoader
from fastmtl.data.resident import ResidentLoader
from fastmtl.errors import BadDataError


@pytest.fixture(autouse=True)
def small_programs(monkeypatch):
    """So few words a program that each tensor has several, where nothing compiles them."""
    if launching.INTERPRET.value:
        monkeypatch.setattr(configs, "CUT", configs.Cut(16, 64, 1, configs.CUT.warps))
        monkeypatch.setattr(configs, "PROGRAMS", 3)
        monkeypatch.setattr(cut, "MOST_TENSORS", 4)


def bits(shape, dtype, rng, device):
    """Numbers of any bits at all, NaNs of every kind among them."""
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    numbers = torch.frombuffer(bytearray(rng.randbytes(n_bytes) or b"0"), dtype=torch.uint8)[:n_bytes]
    return numbers.view(dtype).view(shape).to(device)


def words(tensor):
    return tensor.view(torch.int32)


@pytest.mark.parametrize("case", range(12))
def test_random_columns(case, seed, device):
    rng = random.Random(seed + case)
    n, n_rows = rng.randint(1, 90), rng.choice((0, 1, 2, rng.randint(3, 70)))
    shapes = [rng.choice(((), (2,), (3, 2))) for _ in range(rng.randint(1, 9))]
    shapes = [(rng.choice((0, 1, 2, 3, 4, 7, 8, 16, 23)), *shape) for shape in shapes]
    dtypes = [rng.choice((torch.int32, torch.int64, torch.float32)) for _ in shapes]
    tensors = [bits((n, *shape), dtype, rng, device) for shape, dtype in zip(shapes, dtypes, strict=True)]
    numbers = rng.choice((torch.int32, torch.int64))
    rows = torch.tensor([rng.randrange(n) for _ in range(n_rows)], dtype=numbers, device=device)
    # words behind the batch, which nobody may write
    places = [torch.full((n_rows + 1, *t.shape[1:]), 7, dtype=t.dtype, device=device) for t in tensors]
    backend.cut_rows(tensors, rows, [place[:n_rows] for place in places])
    for tensor, place in zip(tensors, places, strict=True):
        assert torch.equal(words(place[:n_rows]), words(tensor[rows.long()]))
        assert (place[n_rows:] == 7).all()


def test_memory_that_begins_anywhere(seed, device):
    """Views whose addresses are no multiples of 16 bytes are not read 16 bytes at a time."""
    rng = random.Random(seed)
    rows = torch.tensor([rng.randrange(50) for _ in range(31)], dtype=torch.int32, device=device)
    for skipped in (1, 2, 3):
        tensor = bits((50 * 8 + skipped,), torch.int32, rng, device)[skipped:].view(50, 8)
        out = torch.zeros(31 * 8 + skipped, dtype=torch.int32, device=device)[skipped:].view(31, 8)
        backend.cut_rows([tensor], rows, [out])
        assert torch.equal(out, tensor[rows.long()])


def data(seed, n=53, labels=True):
    rng = np.random.default_rng(seed)
    x = {
        "price": rng.random(n),
        "user": rng.integers(0, 1000, n),
        "history": rng.integers(-1, 50, (n, 4)),
        "hash": rng.integers(0, 2**40, n),
        "vector": rng.random((n, 3), dtype=np.float32),
    }
    return TorchDataset(x, rng.integers(0, 2, (n, 2))) if labels else PredictDataset(x)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("picked", [True, False])
def test_a_loader_s_batches_are_cut_in_one_launch(picked, labels, seed, device, triton_backend, monkeypatch):
    made = []
    launch = cut.launch
    monkeypatch.setattr(cut, "MOST_TENSORS", 32)
    monkeypatch.setattr(
        cut, "launch", lambda kernel, *rest, **more: (made.append(kernel), launch(kernel, *rest, **more))
    )
    source = data(seed, labels=labels)
    source = Subset(source, torch.arange(0, 53, 2)) if picked else source
    loader = ColumnLoader(source, 10, shuffle=True)
    torch.manual_seed(seed)
    right = list(loader)
    torch.manual_seed(seed)
    found = list(ResidentLoader(loader, device))
    assert len(made) == len(right) == len(found)
    for one, other in zip(found, right, strict=True):
        (x, y), (xs, ys) = (one, other) if labels else ((one, None), (other, None))
        for name, column in xs.items():
            assert torch.equal(x[name].cpu(), column.to(x[name].dtype)), name
        assert y is None or torch.equal(y.cpu(), ys.float())


@pytest.mark.parametrize("bad", [-1, 53])
def test_numbers_that_others_give_are_looked_at(bad, device, triton_backend):
    class Sampler(list):
        pass

    loader = ColumnLoader(data(0), 10, sampler=Sampler([*range(15), bad]))
    with pytest.raises(BadDataError, match=f"row {bad} of a data set of 53 rows"):
        list(ResidentLoader(loader, device))
    subset = ColumnLoader(Subset(data(0), [0, 5, bad]), 10)
    with pytest.raises(BadDataError, match=f"row {bad} of a data set of 53 rows"):
        list(ResidentLoader(subset, device))


def test_other_backends_cut_as_torch_does(seed, device):
    """Who has no kernel for it, or is compiled, has torch's."""
    loader = ColumnLoader(data(seed), 10, shuffle=True)
    batches = []
    for name in ("triton", "eager"):
        with backends.use_backend(name):
            torch.manual_seed(seed)
            batches.append([y for _, y in ResidentLoader(loader, device)])
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one, other)
