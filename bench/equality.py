"""Whether a contender computes what the others do: by its losses' distance from those of the same training in float64.

float32 alone moves the losses of Adam's first steps: it divides gradients by their own size, so that a rounding error
of one that is almost zero becomes a step. A contender may therefore be as far from float64 as the tolerance of its
precision, or twice as far as torch-rechub in float32, whichever is more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: Greatest relative distance of a loss from float64's, by precision.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def distance(losses: Sequence[float], exact: Sequence[float]) -> float:
    """The greatest relative distance of losses from the exact ones."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses, exact, strict=True))


def check(
    losses: Mapping[str, Sequence[float]], precisions: Mapping[str, str], peer: str, exact: Sequence[float]
) -> dict[str, float]:
    """Refuse contenders that compute something else.

    Args:
        losses: contender -> its losses; one that is held to the first ones only gives no others.
        precisions: contender -> ``"fp32"`` or ``"bf16"``.
        peer: the contender in fp32 that others are compared with; within the tolerance itself, times ten.
        exact: the losses in float64.

    Returns:
        contender -> its :func:`distance` from float64.

    Raises:
        SystemExit: one is too far away; the message says how far.
    """
    distances = {name: distance(found, exact[: len(found)]) for name, found in losses.items()}
    for name, far in distances.items():
        allowed = TOLERANCE[precisions[name]]
        # the peer's own error excuses others, but not everything
        allowed = 10 * allowed if name == peer else max(allowed, 2 * distances[peer])
        if not far <= allowed:
            raise SystemExit(
                f"{name}: its losses are {far:.1e} away from float64's, allowed are {allowed:.0e} "
                f"({peer}: {distances[peer]:.1e}): not the same computation; nothing was timed"
            )
    return distances
