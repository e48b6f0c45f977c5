"""A batch's rows out of columns that lie on the device: all blocks of it in one launch.

What is cut is words of 32 bits, whatever they mean, so the bits of every number stay. A program writes BLOCK words of
one block of the batch, next to each other in memory whatever the width of a row; where a row's width allows it, a lane
reads several words of one at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import cdiv, launch

#: Tensors of a launch: each is asked by every program whether it is the one.
MOST_TENSORS = 32


@triton.jit
def cut_rows_kernel(
    Rows_ptr,  # [B]: row numbers, int32 or int64
    From,  # what is cut, [N, WIDTHS[i]] words each
    To,  # the batch, [B, WIDTHS[i]]
    n_rows,
    WIDTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(len(WIDTHS)):
        n_words = tl.cast(n_rows, tl.int64) * WIDTHS[i]
        n_blocks = (n_words + BLOCK - 1) // BLOCK
        if (block >= 0) & (block < n_blocks):
            begin = block * BLOCK
            if begin + BLOCK <= n_words:  # without a mask, which would keep lanes from several words at a time
                _cut_block(Rows_ptr, From[i], To[i], begin, None, WIDTHS[i], BLOCK)
            else:
                _cut_block(Rows_ptr, From[i], To[i], begin, n_words, WIDTHS[i], BLOCK)
        block -= n_blocks


@triton.jit
def _cut_block(Rows_ptr, From_ptr, To_ptr, begin, end, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    # a lane's words: as many as there are in a row without a rest, up to 16 bytes
    LANE: tl.constexpr = 4 if WIDTH % 4 == 0 else (2 if WIDTH % 2 == 0 else 1)
    first = tl.arange(0, BLOCK // LANE) * LANE
    at = (begin % WIDTH).to(tl.int32) + first  # counted from the row that the block begins in: 32 bits do
    own = begin // WIDTH
    live = None
    if end is not None:
        live = first < end - begin
    row = _load(Rows_ptr + own + at // WIDTH, live).to(tl.int64)
    word = row * WIDTH + at % WIDTH
    # ``begin + first``, in a form that does not show it: neighbouring lanes are to have neighbouring words, also where
    # the compiler could store more of them at once, since a load of theirs would meet four times the lines then
    to = own * WIDTH + (at // WIDTH) * WIDTH + at % WIDTH
    if LANE > 1:
        more = tl.arange(0, LANE)[None, :]
        word = tl.multiple_of(word, LANE)[:, None] + more
        to = tl.multiple_of(to, LANE)[:, None] + more
        if live is not None:
            live = live[:, None]
    tl.store(To_ptr + to, _load(From_ptr + word, live), mask=live)


@triton.jit
def _load(place, live):
    return tl.load(place) if live is None else tl.load(place, mask=live, other=0)


def cut_rows(tensors: Sequence[Tensor], rows: Tensor, out: Sequence[Tensor]) -> None:
    """Write ``tensor[rows]`` of each tensor; what :func:`fastmtl.data.resident.cut_rows` does in torch's operations.

    Args:
        tensors: ``[N, ...]`` each, contiguous, of numbers of 32 or 64 bits.
        rows: ``[B]``, int32 or int64, each from 0 to N - 1: nobody looks whether it is.
        out: ``[B, ...]`` each, contiguous, of their dtypes.
    """
    pairs = [(_words(tensor), _words(buffer)) for tensor, buffer in zip(tensors, out, strict=True) if buffer.numel()]
    for start in range(0, len(pairs), MOST_TENSORS):
        part = pairs[start : start + MOST_TENSORS]
        widths = tuple(buffer.shape[1] for _, buffer in part)
        block = configs.CUT.block(len(rows) * sum(widths))
        launch(
            cut_rows_kernel,
            (sum(cdiv(len(rows) * width, block) for width in widths),),
            configs.CUT.warps,
            Rows_ptr=rows,
            From=tuple(tensor for tensor, _ in part),
            To=tuple(buffer for _, buffer in part),
            n_rows=len(rows),
            WIDTHS=widths,
            BLOCK=block,
        )


def _words(tensor: Tensor) -> Tensor:
    """``[N, ...]`` as ``[N, words]`` int32, the same memory."""
    return tensor.view(len(tensor), -1).view(torch.int32)
