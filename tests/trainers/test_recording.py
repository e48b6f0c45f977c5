"""What recording a step as a CUDA graph needs around it: first steps that are not recorded, a way on after a capture
that was cut short, and optimizers whose counts and vetoes are the device's."""

import gc
import itertools
import sys

import devices
import numpy as np
import pytest
import torch
from torch import nn

from fastmtl.basic.features import DenseFeature, SparseFeature
from fastmtl.data.datasets import TorchDataset
from fastmtl.data.loader import ColumnLoader
from fastmtl.models import MMOE
from fastmtl.optim.dense import prepare_state
from fastmtl.optim.rules import rule_of
from fastmtl.trainers import MTLTrainer, device_optimizer, graph_step
from fastmtl.trainers.device_epoch import DeviceEpochs


class Noting:
    """A recorder that says when it is asked; what it replays leaves ``.grad`` alone, as a graph does."""

    def __init__(self):
        self.events = []

    def record(self, work):
        self.events.append("record")
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)

        def replay():
            self.events.append("replay")
            work()
            for p in self.model.parameters():
                p.grad = None

        return replay


@pytest.fixture
def noted(seed, tmp_path, monkeypatch):
    """A trainer's epochs, a loader of six full batches and one of half, and what happens in what order."""
    torch.manual_seed(seed)
    features = [SparseFeature("user", 40, 4), DenseFeature("age")]
    model = MMOE(features, ["classification"] * 2, 2, {"dims": [6]}, [{"dims": [4]}] * 2)
    settings = {"lr": 0.05, "momentum": 0.9}
    one = MTLTrainer(
        model, optimizer_fn=device_optimizer.SGD, optimizer_params=settings, progress=False, model_path=str(tmp_path)
    )
    rng = np.random.default_rng(seed)
    x = {"user": rng.integers(0, 40, 104), "age": rng.random(104)}
    loader = ColumnLoader(TorchDataset(x, rng.integers(0, 2, (104, 2)).astype(np.float32)), 16)
    one._ready(loader)
    one.model.train()
    recorder = Noting()
    recorder.model = model
    epochs = DeviceEpochs(
        model, one.strategy, one.optimizer, one.reg_loss_fn, one._update, one._autocast, one.device, False, recorder
    )
    work = DeviceEpochs.work
    monkeypatch.setattr(DeviceEpochs, "work", lambda self, slot: (recorder.events.append("work"), work(self, slot))[1])
    return epochs, loader, recorder.events


def plain_steps(events):
    """How many steps ran before something was recorded, and how many there were of each kind."""
    return events.index("record"), events.count("record"), events.count("replay")


def test_what_is_new_in_a_step_runs_unrecorded_first(noted):
    """Its kernels are compiled and loaded then, which is not possible while a stream is recorded."""
    epochs, loader, events = noted
    epochs.run(loader)
    assert plain_steps(events) == (2, 2, 4)
    events.clear()
    epochs.optimizer.param_groups[0]["weight_decay"] = 0.1
    epochs.run(loader)
    assert plain_steps(events) == (2, 2, 4), "all that was known is forgotten"
    events.clear()
    epochs.run(loader)
    assert plain_steps(events) == (12, 1, 7), "the last batch's other place alone is new"


def test_shapes_that_come_and_go_are_not_recorded_without_end(noted):
    """Each twice, so that a recording is made for it, and never again."""
    epochs, loader, events = noted
    x, y = loader.source.take(slice(0, 104))
    batches = [({name: x[name][:n] for name in x}, y[:n]) for n in range(50, 80) for _ in range(2)]
    for _ in range(2):
        events.clear()
        epochs.run(batches)
        assert events.count("record") <= graph_step.MOST_RECORDINGS
        assert len(epochs._slots.live()) == 8
    assert epochs._graphs.n_recorded <= graph_step.MOST_RECORDINGS


def test_gradients_are_shown_when_an_epoch_ends(noted):
    epochs, loader, events = noted
    epochs.run(loader)
    epochs.run(loader)
    assert events[-2:] == ["replay", "work"]
    last = epochs._graphs._shown
    for p, grad in zip(epochs.model.parameters(), last.grads, strict=True):
        assert grad is not None
        assert p.grad is grad


class FakeGraph:
    """torch.cuda.graph as it behaves: the end of a capture that was cut short has an error of its own."""

    made, is_cut_short, pools = 0, False, []

    def __init__(self, graph, pool=None, stream=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"
        FakeGraph.pools.append(pool)

    def __enter__(self):
        assert not gc.isenabled() or FakeGraph.is_cut_short
        FakeGraph.made += 1

    def __exit__(self, kind, error, trace):
        if error is not None:
            FakeGraph.is_cut_short = True
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nmore")


class FakeStream:
    device, device_index = torch.device("cpu"), 0


@pytest.fixture
def recorder(monkeypatch):
    ended = []
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *a, name=name: ended.append((name, *a)), raising=False)
    monkeypatch.setattr(torch.cuda, "graph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), {}))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", itertools.count(1).__next__)
    monkeypatch.setattr(graph_step, "_CUT_SHORT", [])
    monkeypatch.setattr(FakeGraph, "made", 0)
    monkeypatch.setattr(FakeGraph, "pools", [])
    monkeypatch.setattr(FakeGraph, "is_cut_short", False)
    made = graph_step.CudaGraphs(FakeStream())
    made.ended = ended
    return made


def test_a_capture_that_is_cut_short_is_cleared_away(recorder):
    """The first error is told, the allocator's pool is given back, and a capture of something harmless ends well."""

    def work():
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    with pytest.raises(RuntimeError, match=r"^CUDA error: operation not permitted when stream is capturing"):
        recorder.record(work)
    assert recorder.ended == [("_cuda_endAllocateToPool", 0, 1), ("_cuda_releasePool", 0, 1)]
    assert FakeGraph.made == 2
    assert len(graph_step._CUT_SHORT) == 1
    assert gc.isenabled()


def test_nothing_is_collected_while_a_stream_is_recorded(recorder):
    seen = []
    recorder.record(lambda: seen.append(gc.isenabled()))
    assert seen == [False]
    assert gc.isenabled()
    assert not recorder.ended


def test_graphs_share_memory_as_long_as_there_are_any(recorder):
    """torch asserts that the memory which a capture is to share belongs to a graph still."""
    first, second = recorder.record(list), recorder.record(list)
    del first
    third = recorder.record(list)
    del second, third
    recorder.record(list)
    assert FakeGraph.pools == [1, 1, 1, 2]


def test_adagrad_takes_torch_s_fused_step_on_a_gpu(monkeypatch):
    """torch's check of devices denies Adagrad's kernel for GPUs, and its counts are on the host."""

    def deny(p, cuda_unsupported=False):
        assert not cuda_unsupported, "torch refuses a GPU here"

    module = sys.modules[torch.optim.Adagrad.__module__]  # its name in torch.optim is a function's
    monkeypatch.setattr(module, "_device_dtype_check_for_fused", deny)
    p = nn.Parameter(torch.ones(3))
    one = device_optimizer.Adagrad([p], lr=0.1)
    p.grad = torch.full((3,), 2.0)
    one.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))
    far = devices.Elsewhere(one.state[p]["step"])
    one.state[p]["step"] = far
    one._place_counts()
    assert type(one.state[p]["step"]) is torch.Tensor
    assert float(one.state[p]["step"]) == 1


def test_the_cpu_takes_a_gpu_s_counts():
    p = nn.Parameter(torch.ones(3))
    one = torch.optim.Adam([p], lr=0.1)
    p.grad = torch.ones(3)
    one.step()
    one.state[p]["step"] = devices.Elsewhere(torch.tensor(7.0))
    assert not prepare_state(one, p, rule_of(one, one.param_groups[0]))
    assert type(one.state[p]["step"]) is torch.Tensor
    assert float(one.state[p]["step"]) == 7


def test_a_vetoed_first_step_leaves_no_momentum():
    """torch does not write to the buffer then, which may hold anything."""
    p = nn.Parameter(torch.ones(3))
    one = device_optimizer.SGD([p], lr=0.1, momentum=0.9)
    torch.use_deterministic_algorithms(True)  # memory that nobody has written to is NaN then
    try:
        for veto, grad in ((1.0, torch.nan), (0.0, 2.0)):
            one.veto_places()[0].fill_(veto)
            p.grad = torch.full((3,), grad)
            one.step()
            assert torch.equal(p.detach(), torch.full((3,), 1.0 - 0.2 * (1 - veto)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(one.state[p]["momentum_buffer"], torch.full((3,), 2.0))
