"""Activations by name, as modules (for a plain MLP) and as the names that banks of experts compute with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..backends.eager import activate
from ..errors import ConfigError
from ..spec import ACTIVATIONS


class Dice(nn.Module):
    """Dice with one learned scalar, over ``[B, H]``: normalised over the H units of a row by their root sum of squares.

    Source: DIN, Zhou et al., KDD'18, section 5.3, as torch-rechub has it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        return activate(x.unsqueeze(1), "dice", self.alpha).squeeze(1)


_MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "leakyrelu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "dice": Dice,
    "softmax": lambda: nn.Softmax(dim=1),
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "linear": nn.Identity,
}
_NAME_OF = {make: name for name, make in _MODULES.items() if isinstance(make, type)} | {nn.Softmax: "softmax"}


def activation_name(activation: str | type[nn.Module]) -> str:
    """One of :data:`fastmtl.spec.ACTIVATIONS`, from a name in any case or from the module class.

    Raises:
        ConfigError: an activation that is not known; the message lists the known.
    """
    name = activation.lower() if isinstance(activation, str) else _NAME_OF.get(activation)
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is not known; the activations are {', '.join(ACTIVATIONS)}")
    return name


def activation_layer(act_name: str | type[nn.Module]) -> nn.Module:
    """A module for the activation; draws from torch's generator what torch-rechub's would."""
    return _MODULES[activation_name(act_name)]()


__all__ = ["Dice", "activation_layer", "activation_name"]
