"""dz of the last hidden layer, rebuilt from z, the gradient of the gates' mixtures and the gates' shares.

Of all that a backward could write this is the largest buffer whose parts are small: a mixture's gradient is as wide as
one expert, and D as wide as all. So the GEMMs that need dz of the last layer rebuild D too (mixing_backward.py reads
it once, for its sums, and writes nothing of its size). Layers whose activation looks at whole rows, and single hidden
layers, whose blocks reach over experts, have D written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate_bwd, kept
from .hidden import Hidden
from .layer_plan import LayerPlan


@dataclass(frozen=True)
class Mixed:
    """What D of the last hidden layer is rebuilt from.

    Args:
        dy: ``[G, B, H]``, units contiguous: the gradient of the mixtures.
        share: ``[B, columns of the gates]`` fp32: the softmax.
    """

    dy: Tensor
    share: Tensor
    plan: LayerPlan

    def arguments(self, hidden: Hidden) -> dict[str, Any]:
        """What a GEMM's kernel takes by these names, for the layer ``hidden``."""
        return {
            "Dy_ptr": self.dy,
            "Share_ptr": self.share,
            "Members_ptr": self.plan.members,
            "Alphaz_ptr": hidden.stat if hidden.alpha is None else hidden.alpha,
            "stride_de": self.dy.stride(0),
            "stride_db": self.dy.stride(1),
            "n_shares": self.share.shape[1],
            "first_share": self.plan.gate_start[0],
            "n_units": hidden.units,
            "REBUILT": True,
            "GATES": len(self.plan.spec.gates),
            "GATES2": self.plan.n_gates2,
        }

    @staticmethod
    def no_arguments(any_float: Tensor) -> dict[str, Any]:
        """The same where D was written; ``any_float`` stands in for pointers that are not read."""
        pointers = dict.fromkeys(("Dy_ptr", "Share_ptr", "Members_ptr", "Alphaz_ptr"), any_float)
        numbers = dict.fromkeys(("stride_de", "stride_db", "n_shares", "first_share", "n_units"), 0)
        return {**pointers, **numbers, "REBUILT": False, "GATES": 1, "GATES2": 1}


@triton.jit
def rebuilt_gradient_of_z(
    Z_ptr, Stat_ptr, Coef_ptr, Dy_ptr, Share_ptr, Members_ptr, Seed_ptr, alpha, expert, first_row, m, live, column,
    inside, pitch, stride_de, stride_db, n_shares, first_share, n_units, first_unit, drop,
    ACT: tl.constexpr, DROPOUT: tl.constexpr, LAYER: tl.constexpr, GATES: tl.constexpr, GATES2: tl.constexpr,
    UNITS: tl.constexpr,
):  # fmt: skip
    """A block of dz, ``[rows, UNITS]``, of rows ``first_row + m`` and columns that are one expert's units from
    ``first_unit`` on."""
    mask = live[:, None] & inside[None, :]
    z = tl.load(Z_ptr + first_row * pitch + (m[:, None] * pitch + column[None, :]), mask=mask, other=0.0)
    mean = tl.load(Stat_ptr + column, mask=inside, other=0.0)
    scale = tl.load(Stat_ptr + 2 * pitch + column, mask=inside, other=0.0)
    beta = tl.load(Stat_ptr + 3 * pitch + column, mask=inside, other=0.0)
    centred = z.to(tl.float32) - mean[None, :]
    y = centred * scale[None, :] + beta[None, :]
    at = m[:, None] * stride_db + (column - expert * n_units)[None, :]
    dh = tl.zeros_like(y)
    for g in tl.static_range(GATES):
        member = tl.load(Members_ptr + expert * GATES2 + g)
        mixes = live & (member + m >= m)
        share = tl.load(Share_ptr + first_row * n_shares + (m * n_shares + member - first_share), mask=mixes, other=0.0)
        dy = tl.load(Dy_ptr + g * tl.cast(stride_de, tl.int64) + first_row * stride_db + at, mask=mask, other=0.0)
        dh += share[:, None] * dy.to(tl.float32)
    if DROPOUT:
        dh = tl.where(
            kept(Seed_ptr, first_row + m, expert, first_unit, drop, LAYER, UNITS), dh * (1.0 / (1.0 - drop)), 0.0
        )
    d, _dalpha = activate_bwd(y, dh, alpha, inside[None, :], n_units, ACT)
    slope = tl.load(Coef_ptr + column, mask=inside, other=0.0)
    shift = tl.load(Coef_ptr + pitch + column, mask=inside, other=0.0)
    return ((d - shift[None, :]) - centred * slope[None, :]) * scale[None, :]
