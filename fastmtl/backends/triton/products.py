"""The matrix products of hidden layers, by the vendor's library, and which columns each of them is.

z = h W^T, dW = dz^T h and dh = dz W are plain products of buffers: a wide one for each input of the first layer, one
batched over experts above. (Products of our own that rebuild h and dz as they read them move fewer bytes, and were two
to six times slower on an H200: docs/gpu.md, "Products".) What is between them is batch_norm.py's, passes.py's and
mixing.py's.

A weight's operand has a row for each column of z, in z's order, so that experts and gates that read the same input are
one product; rows of columns that pad the gates are 0. Accumulation in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import wgrad
from .layer_plan import Block, LayerPlan


def forward(h: Tensor, weight: Tensor, plan: LayerPlan, layer: int) -> Tensor:
    """z ``[B, pitch]`` of a layer.

    Args:
        h: ``[N, B, I]`` in the products' dtype: the input, or the experts' activations below.
        weight: see operands.py.
    """
    blocks, pitch = plan.blocks(layer), plan.pitch[layer]
    make = torch.empty if sum(block.n * block.width for block in blocks) == pitch else torch.zeros
    z = make(h.shape[1], pitch, dtype=h.dtype, device=h.device)
    for block in blocks:
        product(_sources(h, block), _rows(weight, block).transpose(1, 2), _columns(z, block))
    return z


def weight_gradient(dz: Tensor, h: Tensor, plan: LayerPlan, layer: int, dw: Tensor) -> None:
    """Write dW to ``dw [columns, I]`` fp32, its rows as the weight's operand has them; of those that pad not all."""
    for block in plan.blocks(layer):
        columns, sources, rows = _columns(dz, block), _sources(h, block), _rows(dw, block)
        if wgrad.is_for(columns):
            wgrad.wgrad(columns, sources, rows)
        else:
            product(columns.transpose(1, 2), sources, rows)


def input_gradient(dz: Tensor, weight: Tensor, out: Tensor, plan: LayerPlan, layer: int) -> Tensor:
    """dh, written to ``out [N, B, I]`` of dz's dtype."""
    written: set[int] = set()
    for block in plan.blocks(layer):
        sources = set(range(block.source, block.source + block.n))
        adds = bool(sources & written)
        if adds:  # to some of them: inputs that gates read and no expert does
            for source in sources - written:
                out[source].zero_()
        product(_columns(dz, block), _rows(weight, block), _sources(out, block), adds)
        written |= sources
    for source in set(range(len(out))) - written:
        out[source].zero_()
    return out


def _sources(h: Tensor, block: Block) -> Tensor:
    return h[block.source : block.source + block.n]


def _columns(z: Tensor, block: Block) -> Tensor:
    """``[n, B, width]``."""
    n = block.n * block.width
    return z[:, block.first : block.first + n].view(len(z), block.n, block.width).transpose(0, 1)


def _rows(weight: Tensor, block: Block) -> Tensor:
    """``[n, width, I]``."""
    return weight[block.first : block.first + block.n * block.width].unflatten(0, (block.n, block.width))


def product(a: Tensor, b: Tensor, out: Tensor, adds: bool = False) -> None:
    """The one place that multiplies: ``out = a b`` or ``out += a b``, all ``[n, ., .]``; ``out`` may be fp32 where a
    and b are bf16."""
    is_widened = out.dtype is not a.dtype
    if is_widened and not a.is_cuda:  # what stands in for a GPU has no product with an output of its own dtype
        a, b, is_widened = a.float(), b.float(), False
    if len(a) == 1:  # the library picks better for a single one
        a, b, out = a[0], b[0], out[0]
    if adds:
        (out.addmm_ if a.ndim == 2 else out.baddbmm_)(a, b)
        return
    multiply = torch.mm if a.ndim == 2 else torch.bmm
    if is_widened:
        multiply(a, b, out_dtype=out.dtype, out=out)
    else:
        multiply(a, b, out=out)
