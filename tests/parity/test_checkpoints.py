"""Files: torch-rechub's `.pth` in ours, ours in torch-rechub, and the safetensors folder."""

import pytest
import torch
from devices import call, place

import fastmtl
from parity.cases import KINDS, OURS, THEIRS, build, columns, random_case, tensors
from parity.compare import assert_same_state, perturbed
from parity.training import loaders, problem, trainer


def _fitted(case, package, folder, **keywords):
    """A model after one epoch of the package's trainer, and the file that the trainer saved."""
    model = build(case, package)
    train, val, _ = loaders(case, package)
    runner = trainer(case, package, model, n_epoch=1, model_path=str(folder), **keywords)
    runner.fit(train, val, mode="check", seed=7)
    return model, torch.load(folder / "model_check_7.pth", weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_pth_files_load_both_ways(kind, backend, tmp_path):
    case = problem(kind)
    batch = tensors(columns(case)[0])
    theirs, their_file = _fitted(case, THEIRS, tmp_path)
    ours = build(case, OURS)
    ours.load_state_dict(their_file, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(call(ours.eval(), batch), call(theirs.eval(), batch), rtol=1e-5, atol=1e-6)

    ours, our_file = _fitted(case, OURS, tmp_path)
    assert_same_state(our_file, ours.state_dict())
    theirs = build(case, THEIRS)
    theirs.load_state_dict(our_file, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(call(ours.eval(), batch), call(theirs.eval(), batch), rtol=1e-5, atol=1e-6)


def test_pth_files_with_loss_weights_load_both_ways(tmp_path):
    """torch-rechub's uwl file, which its own fresh model refuses, loads strict; ours loads where its trainer is."""
    case = problem("MMOE")
    uwl = {"adaptive_params": {"method": "uwl"}}
    _, their_file = _fitted(case, THEIRS, tmp_path, **uwl)
    assert {"loss weight.0", "loss weight.1"} <= set(their_file)
    build(case, OURS).load_state_dict(their_file, strict=True)

    _, our_file = _fitted(case, OURS, tmp_path, **uwl)
    theirs = build(case, THEIRS)
    trainer(case, THEIRS, theirs, model_path=str(tmp_path), **uwl)
    theirs.load_state_dict(our_file, strict=True)


@pytest.mark.parametrize("index", range(15))
def test_pretrained_folder_round_trip_is_bitwise(index, backend, tmp_path):
    case = random_case(1000 + index)
    ours = build(case, OURS)
    ours.load_state_dict(perturbed(ours, case), strict=True)
    ours.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}

    batch = tensors(columns(case)[0])
    with torch.no_grad():
        expected = call(ours.eval(), batch)
        for again in (fastmtl.from_pretrained(tmp_path), type(ours).from_pretrained(tmp_path)):
            assert type(again) is type(ours)
            assert_same_state(again.state_dict(), ours.state_dict())
            assert torch.equal(call(place(again).eval(), batch), expected)
