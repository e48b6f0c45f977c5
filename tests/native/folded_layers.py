"""Random layers with small tables folded into them, and what the native backend and eager make of them."""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor

from fastmtl.backends import eager, native
from fastmtl.spec import ExpertGateParams, ExpertGateSpec

from .accuracy import judge, moved, moved_params
from .layers import new_params, random_spec

SMOOTH = ("sigmoid", "tanh", "gelu", "silu", "softmax", "dice")


@dataclasses.dataclass
class Case:
    """A layer over columns of its own and those of small tables, somewhere among each other."""

    spec: ExpertGateSpec
    params: ExpertGateParams
    x: Tensor  # [B, kept columns]
    places: list[tuple[int, int, int]]  # of each table its first column, its first row in `table`, its rows
    table: Tensor
    picks: Tensor
    grad: Tensor
    training: bool

    def whole(self, x: Tensor, table: Tensor) -> Tensor:
        """What the layer reads: x with the looked-up rows in their places."""
        counted = torch.cat([table[at : at + rows] for _, at, rows in self.places])
        rows = torch.cat([counted, counted.new_zeros(1, table.shape[1])])
        parts, column, taken = [], 0, 0
        for t, (place, _, _) in enumerate(self.places):
            parts += [x[:, taken : taken + place - column], rows[self.picks[:, t].long()]]
            taken += place - column
            column = place + table.shape[1]
        return torch.cat([*parts, x[:, taken:]], 1)


def random_case(seed: int, spec: ExpertGateSpec | None = None, batch: int | None = None) -> Case:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dim, n = rng.choice((1, 3, 8, 16, 17)), rng.randint(1, 6)
    places, column, height, counted = [], 0, rng.randrange(3), 0
    for _ in range(n):
        column += rng.choice((0, 0, 1, 5, 20))
        rows = rng.choice((1, 2, 3, 10, 40))
        places.append((column, height, rows))
        column, height, counted = column + dim, height + rows + rng.randrange(3), counted + rows
    width = column + rng.choice((0, 1, 7, 40))
    spec = spec or random_spec(rng)
    while not spec.dims:
        spec = random_spec(rng)
    gates = tuple(dataclasses.replace(gate, input=0) for gate in spec.gates)
    spec = dataclasses.replace(spec, in_features=width, expert_input=(0,) * spec.n_experts, gates=gates)
    batch = rng.choice((2, 3, 33, 64, 100, 257, 600)) if batch is None else batch
    x = torch.randn(batch, width - n * dim, generator=generator)
    table = torch.randn(height + rng.randrange(3), dim, generator=generator)
    starts = [sum(rows for *_, rows in places[:t]) for t in range(n)]
    picks = [
        start + torch.randint(0, rows, (batch,), generator=generator)
        for start, (*_, rows) in zip(starts, places, strict=True)
    ]
    picks = torch.stack(picks, 1).int()
    if rng.random() < 0.5:  # ids that read nothing
        picks[torch.rand(picks.shape, generator=generator) < 0.3] = counted
    params = new_params(spec, generator)
    case = Case(spec, params, x, places, table, picks, torch.empty(0), rng.random() < 0.7)
    with torch.no_grad():
        shape = eager.expert_gate(case.whole(x, table)[None], params, spec, False).shape
    case.grad = torch.randn(shape, generator=generator)
    return case


def folded(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """The native backend's results, and its gradients of x, of the tables' rows and of the parameters."""
    given = native.Folded(torch.tensor(case.places), case.table, case.picks)
    params = ExpertGateParams.of(case.params.learned(), [p.clone() for p in case.params.running()], case.spec)
    out, saved = native.expert_gate_fwd(case.x[None], params, case.spec, case.training, given)
    dx, grads = native.expert_gate_bwd(
        case.grad, case.x[None], params, case.spec, case.training, list(saved), True, given
    )
    assert dx is not None
    of_tables = grads.pop()
    alone, other = native.expert_gate_bwd(
        case.grad, case.x[None], params, case.spec, case.training, list(saved), False, given
    )
    assert alone is None
    assert all(torch.equal(a, b) for a, b in zip(grads, other, strict=True))
    some = case.x.shape[1] // 2
    part, other = native.expert_gate_bwd(
        case.grad, case.x[None], params, case.spec, case.training, list(saved), True, given, some
    )
    assert part is not None
    assert torch.equal(part[0], dx[0, :, :some])
    assert all(torch.equal(a, b) for a, b in zip([*grads, of_tables], other, strict=True))
    return [out.float(), *params.running()], [dx[0], of_tables, *grads]


def unfolded(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The same of eager, by autograd through the lookup."""
    learned = [p.to(dtype, copy=True).requires_grad_() for p in case.params.learned()]
    params = ExpertGateParams.of(learned, [p.to(dtype, copy=True) for p in case.params.running()], case.spec)
    x, table = (t.to(dtype, copy=True).requires_grad_() for t in (case.x, case.table))
    out = eager.expert_gate(case.whole(x, table)[None], params, case.spec, case.training)
    out.backward(case.grad.to(out.dtype))
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (x, table, *learned)]
    grads[1] = torch.cat([grads[1][at : at + rows] for _, at, rows in case.places])
    return [out.detach().to(dtype), *params.running()], grads


def check(seed: int) -> tuple[list[float], int]:
    """The rule of accuracy.py for the native backend, of a random layer without a kink, on whose other side
    rounding may put an element."""
    case = random_case(seed)
    case.spec = dataclasses.replace(case.spec, activation=random.Random(seed).choice(SMOOTH))
    case.params = new_params(case.spec, torch.Generator().manual_seed(seed))

    def on(backend: str, dtype: torch.dtype, bits: torch.Generator | None) -> tuple[list[Tensor], list[Tensor]]:
        params = moved_params(case.params, case.spec, bits)
        near = dataclasses.replace(case, params=params, x=moved(case.x, bits), table=moved(case.table, bits))
        return folded(near) if backend == "native" else unfolded(near, dtype)

    return judge(on, f"training {case.training}, {len(case.x)} rows, {case.places}, {case.spec}", seed)
