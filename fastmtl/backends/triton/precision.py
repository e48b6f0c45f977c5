"""The one place that decides in which precision the kernels multiply.

- bf16: operands rounded to bf16, fp32 accumulation; layer outputs and what is kept for the backward in bf16;
  statistics, normalisation, activations, softmax, mixing and parameter gradients in fp32. Under autocast to bf16, and
  for bf16 inputs.
- tf32: fp32 everywhere, the tensor cores' 10-bit mantissa in products. On request through torch's own switch,
  ``torch.set_float32_matmul_precision("high")``.
- ieee: fp32 products too. The default, as in torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Precision(NamedTuple):
    """How a call computes.

    Args:
        dtype: of the products' operands and of everything of size B that is written.
        dot: what ``tl.dot`` is asked for.
    """

    dtype: torch.dtype
    dot: str

    @property
    def name(self) -> str:
        """``"bf16"``, ``"tf32"`` or ``"ieee"``."""
        return "bf16" if self.dtype is torch.bfloat16 else self.dot


def of_dtype(dtype: torch.dtype) -> Precision:
    """The precision of a call whose operands are kept in ``dtype``: what a backward finds in its saved tensors."""
    if dtype is torch.bfloat16:
        return Precision(dtype, "ieee")
    return Precision(dtype, "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32")


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of an op's output: autocast's where that is on, else the input's."""
    device = (
        "cuda" if tensor.is_meta else tensor.device.type
    )  # meta tensors stand for a GPU's where launches are recorded
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def of_input(x: Tensor) -> Precision:
    """The precision of a call that is about to run on ``x``."""
    return of_dtype(autocast_dtype(x))
