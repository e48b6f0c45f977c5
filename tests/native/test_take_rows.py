"""Rows of several tensors, taken in one call: torch's indexing."""

import numpy as np
import pytest
import torch

from fastmtl.backends import native

DTYPES = (torch.float32, torch.float64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.bfloat16)


def test_random_blocks(base_seed):
    for case in range(200):
        rng = np.random.default_rng([base_seed, case])
        n = int(rng.integers(1, 400))
        blocks = []
        for _ in range(int(rng.integers(0, 4))):
            shape = (n, *(int(size) for size in rng.choice([0, 1, 2, 7, 16, 40], int(rng.integers(0, 3)))))
            blocks.append(torch.from_numpy(100 * rng.standard_normal(shape)).to(DTYPES[rng.integers(len(DTYPES))]))
        rows = torch.from_numpy(rng.integers(0, n, int(rng.integers(0, 100))))
        for taken, block in zip(native.take_rows(blocks, rows), blocks, strict=True):
            want = block[rows]
            assert taken.dtype == want.dtype
            assert torch.equal(taken, want), case


def test_many_rows_come_from_memory_of_their_own():
    block = torch.arange(3_000_000).view(-1, 30)
    rows = torch.arange(90_000).flip(0)
    first, second = (native.take_rows([block], rows)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, block[rows])


@pytest.mark.parametrize("rows", [[0, 5], [-1], [2**62]])
def test_a_row_that_is_not_there_is_refused(rows):
    with pytest.raises(RuntimeError, match=rf"row {rows[-1]} of [59]"):
        native.take_rows([torch.zeros(9, 2), torch.zeros(5, 2)], torch.tensor(rows))


def test_what_lies_otherwise_is_refused():
    rows = torch.tensor([0, 1])
    for blocks, wrong in (
        ([torch.zeros(3, 4).t()], rows),
        ([torch.zeros(())], rows),
        ([torch.zeros(3)], rows.int()),
        ([torch.zeros(3)], rows.unsqueeze(0)),
        ([torch.zeros(3)], torch.tensor([0, 9, 1])[::2]),
        ([torch.zeros(3, device="meta")], rows),
    ):
        with pytest.raises(RuntimeError):
            native.take_rows(blocks, wrong)
