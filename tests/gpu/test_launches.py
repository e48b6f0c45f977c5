"""How launches are made: room for whole tiles, and the GPU that they run on. Nothing runs."""

import contextlib
import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: 'fastmtl[gpu]'"
)


@pytest.mark.parametrize("generation", [8, 9, 10])
@pytest.mark.parametrize("precision", ["bf16", "ieee"])
@pytest.mark.parametrize("last", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("width", [48, 376])
def test_a_scratch_holds_every_tile_that_is_read_or_written(width, last, precision, generation, monkeypatch):
    """Experts and mixture may have tiles of different sizes, and neither masks the rows of the scratch."""
    from triton_workloads import _inference, _mmoe, _towers

    from fastmtl.backends.triton import launch as launching

    found = []

    def note(kernel, grid, warps, arguments):
        if kernel.fn.__name__ == "expert_gate_folded_kernel" and arguments["SCRATCH"]:
            rows = arguments["n_walkers"] * arguments["BLOCK_M"]
            found.append((arguments["DEPTH"], rows, len(arguments["H_ptr"])))

    monkeypatch.setattr(launching, "recorder", note)
    monkeypatch.setattr(launching, "compiling_for", generation)
    for batch in (1, 33, 97, 20000):
        layers = (_mmoe(width, 8, (64, last), 2), _towers(last, (16,), 2))
        _inference(layers, (1000,) * 2, 16, batch, precision)
    assert {depth for depth, _, _ in found} == {0, 2}
    assert [one for one in found if one[1] > one[2]] == []


def test_a_launch_is_on_the_gpu_of_its_tensors(monkeypatch):
    """Triton starts kernels on the current GPU, which need not be theirs."""
    from fastmtl.backends.triton import launch as launching

    events = []

    @contextlib.contextmanager
    def device_of(tensor):
        events.append(("on", tensor))
        yield
        events.append("off")

    tensor = torch.zeros(3)
    kernel = {(2,): lambda **arguments: events.append(arguments["X_ptr"])}
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    launching.launch(kernel, (2,), launching.Warps(), n=3, X_ptr=tensor)
    monkeypatch.setattr(launching, "several_gpus", lambda: True)
    launching.launch(kernel, (2,), launching.Warps(), n=3, X_ptr=tensor)
    assert [event if isinstance(event, str) else type(event) for event in events] == [
        torch.Tensor, tuple, torch.Tensor, "off",
    ]  # fmt: skip
    assert events[1][1] is tensor


def test_launches_that_wait_for_their_data_themselves_may_come_early(monkeypatch):
    """From Hopper on, and only kernels that begin with waiting: all that are told EARLY do."""
    from triton_workloads import _layer, _mmoe, _tower_losses, _towers

    from fastmtl.backends.triton import launch as launching

    options = []
    kernel = {(2,): lambda **arguments: options.append(arguments)}
    tensor = torch.zeros(3)
    for early in ({}, {"EARLY": False}, {"EARLY": True}):
        launching.launch(kernel, (2,), launching.Warps(), X_ptr=tensor, **early)
    assert ["launch_pdl" in one for one in options] == [False, False, True]
    told = []
    monkeypatch.setattr(
        launching, "recorder", lambda kernel, _grid, _warps, arguments: told.append((kernel, arguments))
    )
    for generation in (8, 9, 10):
        told.clear()
        monkeypatch.setattr(launching, "compiling_for", generation)
        _layer(_mmoe(48, 4, (32, 16), 2), 9000, "bf16")
        _tower_losses(_towers(16, (16, 8), 2), 9000)
        early = {kernel: arguments["EARLY"] for kernel, arguments in told if "EARLY" in arguments}
        assert set(early.values()) == {generation >= 9}
    assert len(early) > 8
    for kernel in early:
        first = kernel.fn.__code__.co_names[0]
        assert first == "begin", kernel.fn.__name__
