"""The benchmarks' own arithmetic, and one small run of each: equality is checked, figures fit together."""

from dataclasses import replace

import pytest
import torch

from bench import contenders, equality, floors, folding, measure, products
from bench.shapes import ALI_CCP, CENSUS, Shape
from bench.test_inference import measure_inference
from bench.test_ops import measure_op
from bench.test_steps import measure_steps
from fastmtl import backend
from fastmtl.backends.native_folding import Folding

TINY = replace(CENSUS, name="tiny", vocabs=(7, 30, 4), n_dense=2, expert_dims=(8,), n_expert=3, batch_size=64)
RATES = floors.Machine(fp32=1e11, bf16=4e11, copy=1e10)
NATIVE = ["fastmtl native", "fastmtl native bf16"] if "native" in backend.available() else []
NAMES = [contenders.PEER, contenders.PEER_BF16, "fastmtl eager", *NATIVE]


class Report:
    """Takes what a benchmark reports."""

    def add(self, title, lines, **figures):
        assert all(name in "\n".join(lines) for name in (one["contender"] for one in figures["figures"]))


class Clock:
    """pytest-benchmark's fixture, as far as it is used."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, rounds, iterations):
        for _ in range(rounds * iterations):
            result = target()
        return result


@pytest.fixture(autouse=True)
def _peer():
    pytest.importorskip("torch_rechub")


def test_operations_of_the_reference_shapes():
    """The counts that the design is made of: MMoE 2.12, PLE 3.95 MFLOP a row of ali-ccp, forward."""
    linear = 376 * 256 + 256 * 128
    towers = 2 * (128 * 64 + 64 * 32 + 32)
    assert ALI_CCP.flops() == 2 * (8 * linear + 2 * 376 * 8 + towers) == 2_117_504
    gates = 376 * (6 + 6 + 10) + 128 * 12
    assert ALI_CCP.flops("ple") == 2 * (10 * linear + 10 * (128 * 256 + 256 * 128) + gates + towers) == 3_951_904
    assert ALI_CCP.training_flops == 3 * ALI_CCP.flops()


def test_floor_by_hand():
    shape = Shape("s", (10, 20), 0, 4, 2, (3,), (2,), 8, ("a",), (0.5,))
    lookup = 8 * 2 * (8 + 2 * 4 * 4)
    traffic = lookup + 4 * (8 * 2 * 4 + 4 * (13 * 5 + 6 * 30 / 32) + 7 * 100)
    floor = floors.step_floor(RATES, shape, "mmoe", 8, "bf16", touched=5, dense_params=100)
    assert floor == pytest.approx(3 * 8 * shape.flops() / 4e11 + traffic / 1e10)
    assert floors.forward_floor(RATES, shape, "mmoe", 8, "fp32") == pytest.approx(
        8 * shape.flops() / 1e11 + lookup / 1e10
    )


def test_ratios_are_medians_of_the_rounds_ratios():
    times = {"a": [1.0, 2.0, 6.0], "b": [0.5, 2.0, 1.5]}
    one, two = measure.figures(times, 10, 4e9, {"a": 0.5, "b": 0.25}, ("a", "absent"))
    assert one["ratios"] == {"a": 1.0}
    assert two["ratios"] == {"a": 2.0}
    assert two["ms"] == 1500
    assert two["samples_per_second"] == pytest.approx(10 / 1.5)
    assert two["gflops"] == pytest.approx(4 / 1.5)
    assert two["over_floor"] == 6


def test_the_median_of_each_rate():
    rates = [floors.Machine(1, 60, 700), floors.Machine(2, 40, 900), floors.Machine(3, 50, 800)]
    assert floors.Machine.median(rates) == floors.Machine(2, 50, 800)


def test_turns_begin_with_another_one_each_round():
    order = []
    turns = measure.Turns({name: lambda name=name: order.append(name) for name in "abc"}, 0)
    for _ in range(3):
        turns.round()
    assert order == list("abcbcacab")
    assert all(len(times) == 3 for times in turns.times.values())


@pytest.mark.parametrize("model", ["mmoe", "ple"])
def test_steps(model):
    setting = contenders.Setting(TINY, model, 64, n_batches=3)
    clock = Clock()
    found = measure_steps(setting, False, 2, 0, clock, Report())
    assert [one["contender"] for one in found if "FBGEMM" not in one["contender"]] == NAMES
    for one in found:
        assert one["samples_per_second"] == pytest.approx(64e3 / one["ms"])
        assert one["over_floor"] == pytest.approx(one["ms"] / one["floor_ms"])
        assert clock.extra_info[one["contender"]] == one["ms"]
    assert setting.dense_params == sum(
        p.numel() for name, p in contenders.build("torch_rechub", model, TINY).named_parameters() if "embed" not in name
    )


def test_a_contender_that_computes_something_else_is_not_timed():
    setting = contenders.Setting(TINY, "mmoe", 64, n_batches=3)
    runs, _ = contenders.contenders(compiled=False)
    runners = {one.name: one.make(setting) for one in runs}
    with torch.no_grad():
        next(p for p in runners["fastmtl eager"].model.parameters() if p.ndim == 2).add_(0.3)
    with pytest.raises(SystemExit, match="fastmtl eager: its losses are"):
        contenders.check_steps(runs, runners, setting)


def test_equality_is_judged_by_the_distance_from_float64():
    exact, precisions = [0.5, 0.25], {"peer": "fp32", "ours": "fp32", "half": "bf16", "first": "fp32"}
    peers = [[0.5, 0.25 * (1 + 1e-5)], [0.5, 0.25 * (1 - 3e-5)]]  # rounding alone goes as far as 3e-5
    losses = {
        "peer": [0.5, 0.25], "ours": [0.5 * (1 - 8e-7), 0.25 * (1 + 1.1e-4)], "half": [0.501, 0.25], "first": [0.5]
    }  # fmt: skip
    found = equality.check(losses, precisions, exact, peers, given=1)
    assert found == pytest.approx({"peer": 0, "ours": 1.1e-4, "half": 2e-3, "first": 0})
    for name, bad in (
        ("ours", [0.5 * (1 + 2e-6), 0.25]),  # nothing excuses the losses of given weights
        ("ours", [0.5, 0.25 * (1 + 1.3e-4)]),
        ("half", [0.5, 0.25 * (1 + 2e-2)]),
        ("first", [float("nan")]),
    ):
        with pytest.raises(SystemExit, match=f"{name}: its losses are"):
            equality.check(losses | {name: bad}, precisions, exact, peers, given=1)
    with pytest.raises(SystemExit, match=r"torch-rechub's losses are 2\.0e-03 away"):
        equality.check(losses, precisions, exact, [*peers, [0.501, 0.25]], given=1)


@pytest.mark.parametrize("wrong", [{"lr": 1.01e-3}, {"weight_decay": 0.0}], ids=["rate", "decay"])
def test_an_optimizer_that_is_a_little_wrong_is_not_timed(wrong):
    setting = contenders.Setting(CENSUS, "mmoe", 1024, n_batches=3)
    runs, _ = contenders.contenders(compiled=False)
    runners = {one.name: one.make(setting) for one in runs}
    runners["fastmtl eager"].trainer.optimizer.param_groups[0].update(wrong)
    with pytest.raises(SystemExit, match="fastmtl eager: its losses are"):
        contenders.check_steps(runs, runners, setting)


def test_nudged_weights_are_the_numbers_beside():
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    state = {"w": torch.randn(500), "bn.running_mean": torch.randn(3), "n": torch.tensor(4)}
    moved = equality.nudged(state, seed)
    assert list(moved) == list(state)
    up, down = (torch.nextafter(state["w"], torch.tensor(end)) for end in (float("inf"), -float("inf")))
    assert ((moved["w"] == up) | (moved["w"] == down)).all()
    assert 150 < int((moved["w"] == up).sum()) < 350
    assert all(moved[key] is state[key] for key in ("bn.running_mean", "n"))


def test_inference():
    setting = contenders.Setting(TINY, "mmoe", 64, n_batches=2)
    found = measure_inference(setting, (1, 64), 1, 0, Clock(), Report(), RATES)
    for batch, figures in found.items():
        assert all(one["samples_per_second"] == pytest.approx(1e3 * batch / one["ms"]) for one in figures)


@pytest.mark.parametrize("what", ["embedding_bag", "expert_gate"])
def test_ops(what):
    found = measure_op(what, contenders.Setting(TINY, "mmoe", 64, n_batches=1), 1, 0, Clock(), Report(), RATES)
    assert set(found) == {"forward", "forward + backward"}


@pytest.mark.skipif(not NATIVE, reason="only the native backend folds tables")
@pytest.mark.parametrize("amp", [None, "bf16"])
def test_folding(amp, monkeypatch):
    shape = replace(TINY, embed_dim=16, batch_size=200)
    assert set(folding.measure(shape, "mmoe", amp, 1)) == {"folded", "looked up", "dense columns too"}
    look_up = Folding.look_up

    def wrong(self, *args):
        rows, folded = look_up(self, *args)
        return rows, folded._replace(picks=folded.picks.roll(1, 0))

    monkeypatch.setattr(Folding, "look_up", wrong)
    if amp is None:  # on AMX nothing is folded in bf16
        with pytest.raises(SystemExit, match="folded: its losses are"):
            folding.measure(shape, "mmoe", amp, 1)


@pytest.mark.skipif(not NATIVE, reason="the products are the native library's")
def test_products(monkeypatch):
    found = products.rates(6, 20, 17, seconds=0)
    assert len(found) == 6
    assert all(rate > 0 for rate in found.values())
    monkeypatch.setattr(products.torch, "randn", lambda *shape: torch.full(shape, torch.nan))
    with pytest.raises(SystemExit, match="fp32: the product is off by nan"):
        products.rates(6, 20, 17, seconds=0)
