"""Whether a contender computes what the others do: by its losses' distance from those of the same training in float64.

The losses of the first step are those of given weights, and are held tightly. The later ones are not: Adam divides a
gradient by its own size, so that the rounding error of one that is almost zero becomes a whole step. How far that alone
goes depends on the model (a hundred times further in PLE than in census's MMoE), and is measured: torch-rechub trains
from the same weights, and from weights moved in their last bits. A contender may be :data:`EXCUSED` times as far from
float64 as the furthest of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

#: Greatest relative distance of a loss from float64's, by precision: before the first update, and after it where
#: rounding alone goes less far. A learning rate that is wrong by 1%, or no decay, goes further in MMoE.
TOLERANCE = {"fp32": (1e-6, 2e-5), "bf16": (1e-2, 1e-2)}
#: A contender's distance may be so many times that of rounding alone, of which only a few samples are taken.
EXCUSED = 4
#: Where rounding alone goes further, nothing can be told.
MOST_ROUNDING = 1e-3
#: Trainings from weights that were moved, besides the one from the weights as they are.
NUDGES = (1, 2)


def nudged(state: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A model's weights, each moved to the next number above or below it; what is not learned stays."""
    generator = torch.Generator().manual_seed(seed)

    def moved(value: Tensor) -> Tensor:
        up = torch.rand(value.shape, generator=generator) < 0.5
        return torch.nextafter(value, torch.where(up, torch.inf, -torch.inf))

    learned = {key: value for key, value in state.items() if value.is_floating_point() and "running_" not in key}
    return {**state, **{key: moved(value) for key, value in learned.items()}}


def distances(losses: Sequence[float], exact: Sequence[float]) -> list[float]:
    """The relative distance of each loss from the exact one."""
    return [abs(a - b) / abs(b) for a, b in zip(losses, exact, strict=True)]


def check(
    losses: Mapping[str, Sequence[float]],
    precisions: Mapping[str, str],
    exact: Sequence[float],
    peers: Sequence[Sequence[float]],
    given: int,
) -> dict[str, float]:
    """Refuse contenders that compute something else.

    Args:
        losses: contender -> its losses; one that is held to the first ones only gives no others.
        precisions: contender -> ``"fp32"`` or ``"bf16"``.
        exact: the losses in float64.
        peers: torch-rechub's losses in fp32, from the same weights and from :func:`nudged` ones.
        given: how many of the losses are those of given weights, before an update.

    Returns:
        contender -> the greatest of its :func:`distances` from float64.

    Raises:
        SystemExit: one is too far away; the message says how far.
    """
    rounding = max(max(distances(found, exact)) for found in peers)
    if not rounding <= MOST_ROUNDING:
        raise SystemExit(
            f"torch-rechub's losses are {rounding:.1e} away from float64's, and more than {MOST_ROUNDING:.0e} tells "
            f"nothing of the others': nothing was timed"
        )
    furthest = {}
    for name, found in losses.items():
        before, after = TOLERANCE[precisions[name]]
        far = distances(found, exact[: len(found)])
        for part, allowed in ((far[:given], before), (far[given:], max(after, EXCUSED * rounding))):
            wrong = [distance for distance in part if not distance <= allowed]
            if wrong:
                raise SystemExit(
                    f"{name}: its losses are {max(wrong):.1e} away from float64's, allowed are {allowed:.0e} "
                    f"(rounding alone: {rounding:.1e}): not the same computation; nothing was timed"
                )
        furthest[name] = max(far)
    return furthest
