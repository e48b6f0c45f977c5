"""What the kernels read of a layer's operand: the input as it stands, or a hidden layer rebuilt from its z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...spec import ExpertGateParams, ExpertGateSpec
from .activations import ROW_WISE
from .launch import alignment, round_up


@dataclass(frozen=True)
class Hidden:
    """A hidden layer: its z, and all that turns z into its activations.

    Args:
        z: ``[B, pitch]``.
        stat: ``[4, pitch]`` fp32: mean without the bias, 1 / sigma, gamma / sigma, beta.
        alpha: ``[E]`` or None.
        seed: the call's dropout seed on the device, or None where nothing is dropped.
        layer: its index, which keeps the layers' dropout apart.
        units: H.
    """

    z: Tensor
    stat: Tensor
    alpha: Tensor | None
    seed: Tensor | None
    spec: ExpertGateSpec
    layer: int
    units: int

    @classmethod
    def of(
        cls, z: Tensor, stat: Tensor, params: ExpertGateParams, spec: ExpertGateSpec, seed: Tensor | None, layer: int
    ) -> Hidden:
        """Hidden layer ``layer`` of a call."""
        alpha = params.alpha[layer] if params.alpha else None
        return cls(z, stat, alpha, seed, spec, layer, spec.dims[layer])

    @property
    def pitch(self) -> int:
        """Elements from one row of z to the next."""
        return self.z.shape[1]

    @property
    def row_wise(self) -> bool:
        """Whether the activation needs all units of an expert in one block."""
        return self.spec.activation in ROW_WISE

    @property
    def dropped(self) -> bool:
        """Whether dropout zeroes some of its activations."""
        return self.seed is not None

    def arguments(self) -> dict[str, Any]:
        """What every kernel that rebuilds activations takes by these names."""
        return {
            "Stat_ptr": self.stat,
            "Alpha_ptr": self.stat if self.alpha is None else self.alpha,
            "Seed_ptr": self.stat if self.seed is None else self.seed,
            "drop": float(self.spec.dropout),
            "ACT": self.spec.activation,
            "DROPOUT": self.dropped,
            "LAYER": self.layer,
        }


@dataclass(frozen=True)
class Operand:
    """What a GEMM multiplies: N matrices of the batch's rows, that of number n beginning at ``n * stride_source``.

    Args:
        data: of any shape; units are its last axis, contiguous.
        units: of a row.
        readable: elements of a row that may be read, what lies behind its units included: a multiple of a vector's
            length where that can be had.
        hidden: where ``data`` is a z that is yet to be normalised and activated.
    """

    data: Tensor
    stride_source: int
    stride_row: int
    units: int
    readable: int
    hidden: Hidden | None = None

    @classmethod
    def of_input(cls, x: Tensor) -> Operand:
        """``x [N, B, I]`` as it stands."""
        n_inputs, n_rows, units = x.shape
        padded = round_up(units, 16 // x.element_size())
        last_row = x.storage_offset() + (n_inputs - 1) * x.stride(0) + (n_rows - 1) * x.stride(1)
        inside = padded <= x.stride(1) and (last_row + padded) * x.element_size() <= x.untyped_storage().nbytes()
        return cls(x, x.stride(0) if n_inputs > 1 else 0, x.stride(1), units, padded if inside else units)

    @classmethod
    def of_hidden(cls, hidden: Hidden) -> Operand:
        """Activations, rebuilt as they are read."""
        return cls(hidden.z, hidden.units, hidden.pitch, hidden.units, hidden.units, hidden)

    @classmethod
    def of_activations(cls, h: Tensor, units: int) -> Operand:
        """Activations ``[B, pitch]`` that have been written."""
        return cls(h, units, h.stride(0), units, units)

    def arguments(self, any_float: Tensor) -> dict[str, Any]:
        """What a GEMM kernel takes by these names; ``any_float`` stands in for pointers it does not read."""
        unused = {
            "Stat_ptr": any_float, "Alpha_ptr": any_float, "Seed_ptr": any_float,
            "drop": 0.0, "ACT": "linear", "DROPOUT": False, "LAYER": 0,
        }  # fmt: skip
        return {
            "A_ptr": self.data,
            "stride_as": self.stride_source,
            "stride_ab": self.stride_row,
            "n_in": self.units,
            "n_read": self.readable,
            "PADDED": self.readable != self.units,
            "ALIGN_READ": alignment(self.readable),
            "pitch_a": 0 if self.hidden is None else self.hidden.pitch,
            "NORM": self.hidden is not None,
            "ALIGN_A": alignment(self.stride_source, self.stride_row),
            **(unused if self.hidden is None else self.hidden.arguments()),
        }
