"""As near to float64 as eager is: the rule for every random lookup, layer and chain.

In float32 a backend may be at most twice as far from float64 as eager, plus ``FLOOR``. Eager's own error is what
rounding does to it on this problem. Mostly one run shows that. But where a normalisation of few rows or of nearly equal
ones amplifies a rounding to all of an error, a single run says who was luckier: there it is the largest of eager's
errors on problems that are this one but for the last bits of all their numbers. The backend is not drawn again: its one
result on the problem itself must do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastmtl.spec import ExpertGateParams, ExpertGateSpec

#: In terms of a tensor's largest element: sixteen roundings.
FLOOR = 2e-6
ULP = 2.0**-23
#: Problems that differ in their last bits, at most. Two backends of the same accuracy, whose errors are about normal,
#: are apart by twice the largest of so many once in a million tensors.
DRAWS = 64

#: (backend, dtype, how the last bits are moved: None or a generator) -> (results, gradients)
Run = Callable[[str, torch.dtype, "torch.Generator | None"], tuple[list[Tensor], list[Tensor]]]


def moved(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """``x``, or ``x`` with its last bits changed: by about one unit in the last place."""
    return x if generator is None else x * (1 + 2 * ULP * (torch.rand(x.shape, generator=generator) - 0.5))


def moved_params(params: ExpertGateParams, spec: ExpertGateSpec, generator: torch.Generator | None) -> ExpertGateParams:
    """The same of a layer's parameters and running statistics."""
    learned, running = ([moved(p, generator) for p in part] for part in (params.learned(), params.running()))
    return ExpertGateParams.of(learned, running, spec)


def errors(got: tuple[list[Tensor], list[Tensor]], want: tuple[list[Tensor], list[Tensor]]) -> list[float]:
    """Each tensor's largest error in terms of its largest element; of a gradient, of a tenth of the largest of all."""
    found = []
    for part, (mine, exact) in enumerate(zip(got, want, strict=True)):
        least = 0.1 * max(_largest(exact), default=0.0) if part == 1 else 0.0
        for one, other, scale in zip(mine, exact, _largest(exact), strict=True):
            distance = (one - other).abs().max().item() if other.numel() else 0.0
            found.append(distance / max(scale, least, 1e-30))
    return found


def _largest(tensors: Iterable[Tensor]) -> list[float]:
    return [t.abs().max().item() if t.numel() else 0.0 for t in tensors]


def judge(run: Run, what: str, seed: int, backend: str = "native") -> tuple[list[float], int]:
    """Assert the rule.

    Args:
        run: the problem.
        what: its description, for the message.
        seed: of the last bits.
        backend: the one that is judged.

    Returns:
        (the logarithm of its error over eager's, a number a tensor; problems drawn beside this one).
    """
    want = run("eager", torch.float64, None)
    own, eager = (errors(run(name, torch.float32, None), want) for name in (backend, "eager"))
    ratios = [math.log(mine / theirs) for mine, theirs in zip(own, eager, strict=True) if min(mine, theirs) > 1e-9]
    drawn = 0

    def beyond(factor: float) -> bool:
        return any(not mine <= factor * theirs + FLOOR for mine, theirs in zip(own, eager, strict=True))

    # the largest of more draws will not be four times the largest of eight
    while beyond(2) and drawn < DRAWS and not (drawn >= 8 and beyond(8)):
        bits = [torch.Generator().manual_seed(1000 * seed + drawn) for _ in range(2)]
        near = errors(run("eager", torch.float32, bits[0]), run("eager", torch.float64, bits[1]))
        eager = [max(pair) for pair in zip(eager, near, strict=True)]
        drawn += 1
    for i, (mine, theirs) in enumerate(zip(own, eager, strict=True)):
        assert mine <= 2 * theirs + FLOOR, (
            f"{backend}, seed {seed}: tensor {i} is off by {mine:.1e}, eager by {theirs:.1e} ({drawn} drawn); {what}"
        )
    return ratios, drawn
