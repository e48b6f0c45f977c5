"""Weights as the kernel for Hopper in CUDA C++ (csrc/cuda/folded.cuh) reads them: in stages of 16 KiB, one behind the
other in the order in which a tile of rows needs them, each as it is to lie in shared memory.

A stage holds blocks of weights ``[units, columns]``, 128 or 64 bytes a row; the 16-byte pieces of a row lie where the
tensor cores expect them ("swizzled"): piece p of row r at p ^ (r % 8), or at p ^ (r / 2 % 4) in rows of 64 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .packing import PackedLayer, PackedTowers

#: Activations that the kernel has, by its numbers.
ACTIVATIONS = ("relu", "leakyrelu", "silu")
#: What it is made for: widths of the input, at least and at most, of the layers, at most, and columns of the gates.
_INPUT, _UNITS, _TOWER, _COLUMNS = (65, 384), (256, 128), (64, 32), 24
#: Bytes of a stage.
STAGE = 16384


def why_not(layer: PackedLayer, towers: PackedTowers | None) -> str | None:
    """Why the kernel does not take a layer with the towers behind it; None: it does."""
    spec = layer.spec
    if towers is None or len(towers.spec.dims) != 2 or not spec.gates:
        return "it has gates, and towers of two hidden layers behind them"
    if layer.arguments()["W1_ptr"].dtype is not torch.bfloat16:
        return "it multiplies bf16"
    if len(spec.dims) != 2 or spec.n_inputs != 1 or not _INPUT[0] <= spec.in_features <= _INPUT[1]:
        return f"experts have two hidden layers and read one input of {_INPUT[0]} to {_INPUT[1]} columns"
    for dims, most in ((spec.dims, _UNITS), (towers.spec.dims, _TOWER)):
        # narrower ones would be padded to more than twice their work
        if any(not m // 2 < n <= m for n, m in zip(dims, most, strict=True)):
            return f"layers of {dims} units; it has {most}, or a half and more of them"
    if spec.gate_rows > _COLUMNS:
        return f"{spec.gate_rows} columns of gates, more than {_COLUMNS}"
    if spec.activation not in ACTIVATIONS or towers.spec.activation != spec.activation:
        return f"{spec.activation} and {towers.spec.activation}; it has {', '.join(ACTIVATIONS)}, for both"
    return None


class Stages(NamedTuple):
    """A layer's and its towers' weights, as the op ``fastmtl_cuda::folded`` takes them."""

    weights: Tensor  # [stages, 16384] uint8
    biases: Tensor  # [E, 256 + 128] fp32
    gate_bias: Tensor  # [24] fp32
    gate_columns: Tensor  # [G + 1] int32
    members: Tensor  # [E, G] int32
    tower_bias1: Tensor  # [G, 64] fp32
    tower_bias2: Tensor  # [G, 32]
    head: Tensor  # [G, 32]
    head_bias: Tensor  # [G]


def stages_of(layer: PackedLayer, towers: PackedTowers) -> Stages:
    """Pack once more what :func:`why_not` has nothing to say of."""
    mine, theirs, spec = layer.arguments(), towers.tower_arguments(), layer.spec
    w1, w2, gates = mine["W1_ptr"], mine["W2_ptr"], mine["Wg_ptr"][0]
    inputs = -(-spec.in_features // 32) * 32
    w1 = _filled(w1[:, :, :inputs], _UNITS[0], inputs)
    w2 = _filled(w2, _UNITS[1], _UNITS[0])
    gates = _filled(gates[: spec.gate_rows, : spec.in_features], _COLUMNS, _INPUT[1])
    t1 = _filled(theirs["T1_ptr"][:, :, : _UNITS[1]], _TOWER[0], _UNITS[1])
    t2 = _filled(theirs["T2_ptr"], _TOWER[1], _TOWER[0])
    found = []
    for e in range(spec.n_experts):
        found += [[block] for block in w1[e].split(32, dim=1)]
        found += [[block] for block in w2[e].split(64, dim=1)]
    blocks = gates.split(64, dim=1)
    found += [list(blocks[:3]), list(blocks[3:])]
    for g in range(len(spec.gates)):
        found += [list(t1[g].split(64, dim=1)), [t2[g]]]
    columns = [0, *(span[1] for span in spec.gate_spans)]
    return Stages(
        torch.stack([_stage(blocks) for blocks in found]),
        torch.cat([_wide(mine["B1_ptr"], _UNITS[0]), _wide(mine["B2_ptr"], _UNITS[1])], dim=1),
        _wide(mine["Bg_ptr"][: spec.gate_rows], _COLUMNS),
        torch.tensor(columns, dtype=torch.int32, device=w1.device),
        mine["Members_ptr"].contiguous(),
        _wide(theirs["Tb1_ptr"], _TOWER[0]),
        _wide(theirs["Tb2_ptr"], _TOWER[1]),
        _wide(theirs["Head_ptr"], _TOWER[1]),
        theirs["Headb_ptr"].reshape(-1).contiguous(),
    )


def _filled(weight: Tensor, rows: int, columns: int) -> Tensor:
    """``[.., rows, columns]``, zeros behind the weight."""
    return pad(weight, (0, columns - weight.shape[-1], 0, rows - weight.shape[-2]))


def _wide(bias: Tensor, columns: int) -> Tensor:
    return pad(bias, (0, columns - bias.shape[-1])).contiguous()


def _swizzled(block: Tensor) -> Tensor:
    """A block ``[rows, 64 or 32]`` bf16 as bytes in their places."""
    rows, columns = block.shape
    pieces = block.reshape(rows, columns // 8, 8)
    row = torch.arange(rows, device=block.device)[:, None]
    by = row % 8 if columns == 64 else row // 2 % 4
    piece = torch.arange(columns // 8, device=block.device)[None, :] ^ by
    return pieces[row, piece].contiguous().view(torch.uint8).reshape(-1)


def _stage(blocks: list[Tensor]) -> Tensor:
    found = torch.cat([_swizzled(block) for block in blocks])
    return pad(found, (0, STAGE - len(found)))
