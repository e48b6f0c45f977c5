"""How numbers are compared: against torch-rechub in fp32, and where rounding is amplified against it in float64.

The rule: a tensor passes when ``max|ours - theirs| <= tolerance * max|theirs|``. A model that amplifies rounding (a
BatchNorm over two rows divides a rounding error by sqrt(eps); a ReLU's input within rounding of zero may fall on either
side) is not computed to that tolerance by torch-rechub either, so a tensor that fails passes if it is no further from
torch-rechub in float64 than twice torch-rechub's own fp32 distance. One run may hit the exact number by luck, so that
distance is the largest over runs that round differently: parameters are nudged by at most one unit in the last place,
activations within rounding of a kink fall on either side of it, and a bias in front of a BatchNorm, which decides the
rounding and nothing else, is there or not. Even so one number in many thousands lies a little beyond twice; a case may
have one in a hundred (and one in any case) between twice and four times.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import NamedTuple

import torch
from devices import call, fetch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.cases import Case, columns, tensors

NUDGED_RUNS = (0, 4, 12, 40)
ULP = 2.0**-23
#: An activation's input this close to zero, relative to the largest of its layer, may round to either side.
KINK = 16 * ULP
#: How many times torch-rechub's own noise the gradient of a bias in front of a BatchNorm may be: a sum that cancels to
#: zero leaves what the order of summation makes it, of which the runs of one implementation see a part only.
FREE_FACTOR = 16.0
#: Gradients of weights are sums over the batch, which may cancel: so many units in the last place of the sum of the
#: summands' sizes are rounding.
SUM_FACTOR = 2.0
#: Tensors this much smaller than the largest of their kind are rounding noise around zero.
FLOOR = 1e-9

Numbers = dict[str, Tensor]


class Complaint(NamedTuple):
    """What is wrong with one number, and by how many times torch-rechub's own distance it is off."""

    text: str
    ratio: float


def task_losses(task_types: tuple[str, ...], y_pred: Tensor, y: Tensor) -> list[Tensor]:
    """BCE or MSE of each task, by its type."""
    losses = []
    for t, task_type in enumerate(task_types):
        loss = F.binary_cross_entropy if task_type == "classification" else F.mse_loss
        losses.append(loss(y_pred[:, t], y[:, t]))
    return losses


def eval_numbers(case: Case, model: nn.Module, x: dict[str, Tensor]) -> Numbers:
    """The columns of the eval output, ``{"output t": [B]}``."""
    model.eval()
    with torch.no_grad():
        y_pred = call(model, x)
    return {f"output {t}": y_pred[:, t] for t in range(y_pred.shape[1])}


def train_numbers(case: Case, model: nn.Module, x: dict[str, Tensor], y: Tensor) -> tuple[Numbers, Numbers]:
    """One step's numbers without an update: ``(columns of the train output and BN statistics after it, gradients)``."""
    model.train()
    y_pred = call(model, x)
    torch.stack(task_losses(case.task_types, y_pred, y.to(y_pred.dtype))).mean().backward()
    numbers = {f"train output {t}": y_pred[:, t].detach() for t in range(y_pred.shape[1])}
    numbers |= {
        k: v.clone() for k, v in fetch(model.state_dict()).items() if k.endswith(("running_mean", "running_var"))
    }
    if hasattr(model, "named_gradients"):
        return numbers, {name: fetch(grad).clone() for name, grad in model.named_gradients()}
    return numbers, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def perturbed(model: nn.Module, case: Case) -> Numbers:
    """A state in which nothing is as initialised: every parameter and BN buffer moved, padding rows still zero."""
    padded = {f"embedding.embed_dict.{f.name}.weight": f.padding_idx for f in case.features if f.shared_with is None}
    generator = torch.Generator().manual_seed(case.seed)
    state = {}
    for name, value in fetch(model.state_dict()).items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.randint(1, 1000, (), generator=generator)
        elif name.endswith("running_var"):
            state[name] = torch.exp(0.5 * noise)
        elif value.ndim < 2:
            state[name] = value + 0.2 * noise
        else:
            state[name] = value + 0.3 * value.std(unbiased=False) * noise
            if padded.get(name) is not None:
                state[name][padded[name]] = 0
    return state


def assert_same_state(ours: Numbers, theirs: Numbers) -> None:
    """The same keys, and bitwise equal values of the same dtypes, wherever they are."""
    ours, theirs = fetch(ours), fetch(theirs)
    assert set(ours) == set(theirs), f"only ours {set(ours) - set(theirs)}, missing {set(theirs) - set(ours)}"
    differing = [
        name for name, value in theirs.items() if ours[name].dtype != value.dtype or not torch.equal(ours[name], value)
    ]
    assert not differing, f"differing: {differing}"


def nudged(state: Numbers, seed: int) -> Numbers:
    """The state with each float moved by at most one unit in the last place."""
    generator = torch.Generator().manual_seed(seed)
    return {
        k: v * (1 + ULP * (2 * torch.rand(v.shape, generator=generator) - 1)) if v.is_floating_point() else v
        for k, v in state.items()
    }


def with_open_kinks(model: nn.Module, seed: int) -> nn.Module:
    """A copy of a torch-rechub model whose ReLU-like activations take either side where the input is nearly zero."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)

    def either_side(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        z = inputs[0]
        slope = module.weight if isinstance(module, nn.PReLU) else getattr(module, "negative_slope", 0.0)
        shift = KINK * z.detach().abs().max() * (2 * torch.rand(z.shape, generator=generator) - 1)
        return torch.where(z + shift > 0, z, slope * z)

    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.LeakyReLU, nn.PReLU)):
            module.inplace = False
            module.register_forward_hook(either_side)
    return model


def without_free_biases(state: Numbers) -> tuple[Numbers, Numbers]:
    """The same function with no bias in front of a BatchNorm: ``(state, what its running means lack)``."""
    state, taken = dict(state), {}
    for bias in bias_before_norm(list(state)):
        block, place, _ = bias.rsplit(".", 2)
        mean = f"{block}.{int(place) + 1}.running_mean"
        taken[mean] = state[bias]
        state[mean], state[bias] = state[mean] - state[bias], torch.zeros_like(state[bias])
    return state, taken


def in_float64(model: nn.Module) -> nn.Module:
    """A float64 copy of a torch-rechub model: its mask and its dense columns, fixed to float32 in the code, follow."""
    model = copy.deepcopy(model).double()
    for module in (model.embedding, model.embedding.input_mask):
        module.register_forward_hook(lambda _module, _inputs, output: output.double())
    return model


class Reference:
    """torch-rechub's numbers for a case: in fp32, and where asked for in float64 with its own distance from it."""

    def __init__(self, case: Case, theirs: nn.Module):
        self.case = case
        self.model = theirs
        self.initial = {k: v.clone() for k, v in theirs.state_dict().items()}
        self.state = perturbed(theirs, case)
        x, y = columns(case)
        self.x, self.y = tensors(x), torch.from_numpy(y)
        self._own: dict[str, Numbers] = {}

    def _run(self, model: nn.Module, state: Numbers) -> Numbers:
        model.load_state_dict(state)
        model.zero_grad()
        numbers = eval_numbers(self.case, model, self.x)
        if not self.case.has_dropout:
            values, gradients = train_numbers(self.case, model, self.x, self.y)
            numbers |= values | {f"gradient {k}": v.clone() for k, v in gradients.items()}
        return numbers

    @cached_property
    def numbers(self) -> Numbers:
        """fp32, from the perturbed state."""
        return self._run(self.model, self.state)

    @cached_property
    def exact(self) -> Numbers:
        """float64, from the same state."""
        return self._run(in_float64(self.model), self.state)

    @cached_property
    def summands(self) -> dict[str, float]:
        """By the weights of linear layers and tables: the largest sum of the sizes of what is added up to an element of
        the gradient, in float64."""
        model, found = in_float64(self.model), {}

        def note(name: str, sizes: Tensor) -> None:
            found[name] = found.get(name, 0.0) + sizes

        def linear(name: str, inputs: Tensor, grad: Tensor) -> None:
            note(name, grad.abs().flatten(0, -2).T @ inputs.detach().abs().flatten(0, -2))

        def table(name: str, ids: Tensor, grad: Tensor, weight: Tensor) -> None:
            sizes = torch.zeros_like(weight, requires_grad=False)
            note(name, sizes.index_add_(0, ids.flatten().long(), grad.abs().flatten(0, -2).to(sizes)))

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
                if not output.requires_grad:
                    return
                if isinstance(module, nn.Linear):
                    output.register_hook(lambda grad: linear(name, inputs[0], grad))
                else:
                    output.register_hook(lambda grad: table(name, inputs[0], grad, module.weight))

            return hook

        for path, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.register_forward_hook(watch(f"{path}.weight"))
        self._run(model, self.state)
        return {name: _size(sizes) for name, sizes in found.items()}

    @cached_property
    def _nudged_runs(self) -> list[Numbers]:
        return [self.numbers]

    def own_distance(self, name: str, runs: int) -> float:
        """The largest distance of torch-rechub in fp32 from float64 over the plain run and ``runs`` nudged ones."""
        while len(self._nudged_runs) <= runs:
            seed = len(self._nudged_runs)
            state, taken = without_free_biases(self.state) if seed % 2 else (self.state, {})
            numbers = self._run(with_open_kinks(self.model, seed), nudged(state, seed))
            self._nudged_runs.append(numbers | {k: numbers[k] + v for k, v in taken.items() if k in numbers})
        return max(_distance(run[name], self.exact[name]) for run in self._nudged_runs)

    def is_noise(self, name: str, ours: Tensor) -> bool:
        """Whether a gradient that is zero in truth is no larger than FREE_FACTOR times torch-rechub's noise there."""
        return any(_size(ours) <= FREE_FACTOR * self.own_distance(name, runs) for runs in NUDGED_RUNS)

    def complaint(self, name: str, ours: Tensor, tolerance: float, scale: float = 0.0) -> Complaint | None:
        """None when ``ours`` passes the rule of this module for the number ``name``; else the figures.

        Args:
            scale: the size below which a difference is noise whatever the tensor's own size.
        """
        theirs = self.numbers[name]
        if ours.shape != theirs.shape:
            return Complaint(f"{name}: shape {tuple(ours.shape)}, torch-rechub's is {tuple(theirs.shape)}", math.inf)
        if not torch.isfinite(ours).all():
            return Complaint(f"{name}: not finite", math.inf)
        if _distance(ours, theirs) <= tolerance * _size(theirs) + scale:
            return None
        off = _distance(ours, self.exact[name])
        for runs in NUDGED_RUNS:
            own = self.own_distance(name, runs)
            if off <= 2 * own:
                return None
        size = _size(self.exact[name])
        text = (
            f"{name}: {_distance(ours, theirs):.2e} from torch-rechub, {off:.2e} from float64 where torch-rechub is "
            f"{own:.2e}; the largest element is {size:.2e}, tolerance {tolerance:.0e}"
        )
        return Complaint(text, off / own if own else math.inf)


def verdict(complaints: Iterable[Complaint | None], n_numbers: int) -> list[str]:
    """The complaints that stand, all of them or none: see the rule of this module."""
    found = [complaint for complaint in complaints if complaint is not None]
    outliers = max(1, n_numbers // 100)
    if len(found) <= outliers and all(complaint.ratio <= 4 for complaint in found):
        return []
    return [complaint.text for complaint in found]


def _size(a: Tensor) -> float:
    return float(a.abs().max())


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def bias_before_norm(names: list[str]) -> dict[str, str]:
    """The biases whose true gradient is zero because a BatchNorm follows: ``{bias: weight of the same Linear}``."""
    tracked = {
        name.rsplit(".", 2)[0] + f".{int(name.rsplit('.', 2)[1]) - 1}" for name in names if "running_var" in name
    }
    return {f"{linear}.bias": f"{linear}.weight" for linear in tracked}


def gradient_complaints(reference: Reference, ours: Numbers, tolerance: float) -> list[Complaint | None]:
    """What is wrong with our gradients; None for each that passes."""
    prefix = "gradient "
    theirs = {k.removeprefix(prefix): v for k, v in reference.numbers.items() if k.startswith(prefix)}
    if set(ours) != set(theirs):
        names = f"only ours {set(ours) - set(theirs)}, missing {set(theirs) - set(ours)}"
        return [Complaint(f"gradients under other names: {names}", math.inf)]
    largest = max(_size(gradient) for gradient in theirs.values())
    free = bias_before_norm(list(reference.state))
    # The true gradient of these is zero: what either package has is noise, which is to be small beside the weight's.
    noise = max((_size(theirs[b]) / max(_size(theirs[w]), FLOOR * largest) for b, w in free.items()), default=0.0)
    complaints: list[Complaint | None] = []
    for name, gradient in ours.items():
        if name not in free:
            complaint = reference.complaint(prefix + name, gradient, tolerance, FLOOR * largest)
            if complaint is not None:
                scale = SUM_FACTOR * ULP * reference.summands.get(name, 0.0)
                complaint = reference.complaint(prefix + name, gradient, tolerance, max(FLOOR * largest, scale))
            complaints.append(complaint)
            continue
        share = _size(gradient) / max(_size(ours[free[name]]), FLOOR * largest)
        if share > max(1e-3, 4 * noise) and not reference.is_noise(prefix + name, gradient):
            text = f"gradient {name}: {share:.1e} of its weight's, where torch-rechub has up to {noise:.1e}"
            complaints.append(Complaint(text, math.inf))
    return complaints
