"""What only a GPU shows of the trainer's step: captures, the waits that there are not, and the host's share."""

import contextlib
import os

import pytest
import torch
from trainer_cases import make_loader, train

from fastmtl import backend as backends
from fastmtl.trainers import device_epoch, graph_step, recorders
from fastmtl.trainers.device_epoch import DeviceEpochs
from fastmtl.trainers.slots import Slots
from fastmtl.trainers.streams import CudaStreams

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available(),
    reason="there is no GPU to capture a graph on",
)


def test_a_refused_capture_leaves_torch_whole(device):
    """Its allocator, its random numbers, and the next capture."""
    streams = CudaStreams(device)
    graphs = recorders.CudaGraphs(streams.main)
    place = torch.zeros(4, device=device)

    def refused():
        torch.rand(4, device=device)
        place.add_(1).sum().item()

    def drawn():
        place.copy_(torch.rand(4, device=device))

    with streams.steps():
        with pytest.raises(RuntimeError, match="capturing"):
            graphs.record(refused)
        torch.manual_seed(5)
        right = torch.rand(4, device=device)
        replay = graphs.record(drawn)
        torch.manual_seed(5)
        replay()
    assert torch.equal(place, right)


def test_an_epoch_goes_on_where_capture_is_refused(seed, device, tmp_path, capsys, monkeypatch):
    """With dropout, whose draws a capture that was cut short would have ended."""
    monkeypatch.setattr(DeviceEpochs, "_begin", _telling(DeviceEpochs._begin))
    plain, weights, _ = train(seed, "triton", device, tmp_path, "exact", dropout=0.3)
    work = DeviceEpochs.work

    def waiting(self, slot):
        work(self, slot)
        float(self._losses.sum())

    monkeypatch.setattr(DeviceEpochs, "work", waiting)
    losses, same, trainer = train(seed, "triton", device, tmp_path, "exact", dropout=0.3)
    assert trainer._epochs._graphs.n_recorded == 0
    assert "not permitted when stream is capturing" in capsys.readouterr().err
    assert torch.equal(losses, plain)
    for name, value in weights.items():
        assert torch.equal(value, same[name]), name


def _telling(begin):
    def begin_and_tell(self):
        begin(self)
        if self._graphs is not None:
            self._graphs._is_quiet = False

    return begin_and_tell


@pytest.mark.parametrize("update", ["exact", "dense"])
@pytest.mark.parametrize("kind", ["chain", "autograd"])
def test_steps_wait_for_nothing(kind, update, seed, device, tmp_path, monkeypatch):
    """torch raises where the host would wait for the device: in a step, recorded or not, and in filling a place."""
    if kind == "autograd":
        monkeypatch.setattr(device_epoch.ChainGradients, "of", classmethod(lambda cls, *_: None))
    _, _, trainer = train(seed, "triton", device, tmp_path, update, epochs=0)
    loader = make_loader(seed)  # one for all epochs: the places of another's batches are others
    step, fill = DeviceEpochs.step, Slots.fill
    taken = []

    def watched(call):
        def run(self, *arguments):
            n_recorded = trainer._epochs._graphs.n_recorded
            torch.cuda.set_sync_debug_mode("error" if n_recorded == 4 else "default")
            taken.append(n_recorded)
            try:
                return call(self, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    monkeypatch.setattr(DeviceEpochs, "step", watched(step))
    monkeypatch.setattr(Slots, "fill", watched(fill))
    with backends.use_backend("triton"):
        for _ in range(5):
            trainer.train_one_epoch(loader)
        slots = [slot for shape in trainer._epochs._slots._shapes.values() for slot in shape.slots]
        assert all(slot._replay is not None for slot in slots)
        for slot in slots:
            slot._replay = None
        monkeypatch.setattr(recorders.Recordings, "record", lambda *_: None)
        monkeypatch.setattr(graph_step, "WARM_UPS", (10**9, 1))
        trainer._epochs._graphs._recordings.clear()
        monkeypatch.setattr(type(trainer._epochs._graphs), "n_recorded", 4)
        trainer.train_one_epoch(loader)
    assert taken.count(4) == 16 + 8


@pytest.mark.parametrize("late", ["steps", "fills"])
def test_streams_wait_for_each_other(late, seed, device, tmp_path, monkeypatch):
    """One of them is held up before each piece of its work, so that the other would overtake it."""
    right, weights, _ = train(seed, "triton", device, tmp_path, "exact", epochs=4)
    owner, name = (DeviceEpochs, "step") if late == "steps" else (Slots, "fill")
    inner = getattr(owner, name)

    def held_up(self, given):
        with self.streams.beside() if late == "fills" else contextlib.nullcontext():
            torch.cuda._sleep(5_000_000)
        return inner(self, given)

    monkeypatch.setattr(owner, name, held_up)
    losses, same, trainer = train(seed, "triton", device, tmp_path, "exact", epochs=4)
    assert trainer._epochs._graphs.n_recorded == 4
    assert torch.equal(losses, right)
    for key, value in weights.items():
        assert torch.equal(value, same[key]), key
