"""Random models of all five kinds with lively parameters, and what they predict in float64."""

from __future__ import annotations

import copy

import torch
from parity.cases import OURS, Case, build, columns, random_case, tensors
from torch import Tensor, nn

from fastmtl.backend import use_backend


def enliven(model: nn.Module, generator: torch.Generator) -> None:
    """Statistics, scales and shifts as after some training, and tables that are not almost zero."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "running_var" in name:
                tensor.uniform_(0.5, 2, generator=generator)
            elif "gamma" in name:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif "alpha" in name:
                tensor.uniform_(0, 0.5, generator=generator)
            elif "table" in name:
                tensor.normal_(0, 0.5, generator=generator)
            elif any(part in name for part in ("running_mean", "beta", "bias")):
                tensor.normal_(0, 0.3, generator=generator)


def lively_model(index: int) -> tuple[Case, nn.Module, dict[str, Tensor]]:
    """Case number ``index``, its model in evaluation mode, and its batch."""
    case = random_case(index)
    model = build(case, OURS).cpu().eval()
    enliven(model, torch.Generator().manual_seed(case.seed))
    return case, model, tensors(columns(case)[0])


def exact(model: nn.Module, x: dict[str, Tensor]) -> Tensor:
    """The predictions by ``eager`` in float64 from the looked-up rows."""
    with torch.no_grad(), use_backend("eager"):
        row = model.embedding(x, model.embedding.features, squeeze_dim=True)
        return copy.deepcopy(model).double()._predict(row.double())
