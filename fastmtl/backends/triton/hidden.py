"""What kernels are told of a hidden layer, and of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...spec import ExpertGateParams, ExpertGateSpec
from .activations import ROW_WISE
from .launch import round_up


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

    def by_expert(self, buffer: Tensor) -> Tensor:
        """A buffer ``[B, pitch]`` of its shape as ``[E, B, H]``."""
        n = self.spec.n_experts
        return buffer[:, : n * self.units].view(len(buffer), n, self.units).transpose(0, 1)

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
    """What inference multiplies: N matrices of the batch's rows, that of number n beginning at ``n * stride_source``.

    Args:
        units: of a row.
        readable: elements of a row that may be read, what lies behind its units included: a multiple of a vector's
            length where that can be had.
    """

    stride_source: int
    stride_row: int
    units: int
    readable: int

    @classmethod
    def of_input(cls, x: Tensor) -> Operand:
        """``x [N, B, I]`` as it stands."""
        n_inputs, n_rows, units = x.shape
        padded = round_up(units, 16 // x.element_size())
        last_row = x.storage_offset() + (n_inputs - 1) * x.stride(0) + (n_rows - 1) * x.stride(1)
        inside = padded <= x.stride(1) and (last_row + padded) * x.element_size() <= x.untyped_storage().nbytes()
        return cls(x.stride(0) if n_inputs > 1 else 0, x.stride(1), units, padded if inside else units)
