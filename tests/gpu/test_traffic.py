"""What a training step moves between the GPU's memory and its kernels, counted from the launches of a real shape."""

import importlib.util

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: 'fastmtl[gpu]'"
)

BATCH = 65536
#: What a buffer as wide as one expert's last layer takes, in bf16.
SMALL = BATCH * 128 * 2


def moved(run):
    """Megabytes of each launch, each operand with a batch axis counted once; and the sizes of all such buffers.

    Of the gates' columns in the first layer's buffers only their own sectors are read and written.
    """
    from fastmtl.backends.triton import launch as launching
    from fastmtl.backends.triton import products

    calls, made, multiply = [], {}, products.product

    def note(kernel, grid, warps, arguments):
        seen, name_of_kernel = {}, getattr(kernel, "__name__", None) or kernel.fn.__name__
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and value.numel() * value.element_size() >= BATCH * 16:
                storage = value.untyped_storage()
                is_gates = name == "Zg_ptr" or (name_of_kernel == "expert_gate_softmax_kernel" and name == "D_ptr")
                # dz of the gates' columns alone
                is_gates |= name_of_kernel == "expert_gate_dz_kernel" and arguments["first_block"] > 0
                if not (is_gates and storage._cdata in seen):
                    seen[storage._cdata] = BATCH * 64 if is_gates else storage.nbytes()
                made[storage._cdata] = value  # held, so that no other storage gets its number
        calls.append((name_of_kernel, sum(seen.values()) / 1e6))

    def product(a, b, out, adds=False):
        multiply(a, b, out, adds)
        sizes = [value.numel() * value.element_size() for value in (a, b, out)]
        for value in (a, b, out):
            if value.untyped_storage().nbytes() >= BATCH * 16:
                made[value.untyped_storage()._cdata] = value
        calls.append(("product", (sum(sizes) + adds * sizes[2]) / 1e6))

    launching.recorder, products.product = note, product
    try:
        run()
    finally:
        launching.recorder, products.product = None, multiply
    return calls, [value.untyped_storage().nbytes() for value in made.values()]


def ali_ccp_step():
    """Layers and losses of MMoE in bf16, from the looked-up row to its gradient."""
    from triton_workloads import _mmoe, _parameters, _towers

    from fastmtl.backends import triton as backend

    spec, towers = _mmoe(376, 8, (256, 128), 2), _towers(128, (64, 32), 2)
    x = torch.empty(1, BATCH, 376, dtype=torch.bfloat16, device="meta")
    params = _parameters(spec)
    y, saved = backend.expert_gate_fwd(x, params, spec, True)
    labels = torch.empty(BATCH, 2, device="meta")
    binary = torch.empty(2, dtype=torch.bool, device="meta")
    _, _, dy, _ = backend.tower_losses(y, _parameters(towers), towers, labels, binary, labels[0], True)
    backend.expert_gate_bwd(dy, x, params, spec, True, list(saved), True)


def test_bytes_of_a_step():
    """As wide as the experts are z and dz of both layers, the first one's activations and their gradient."""
    calls, buffers = moved(ali_ccp_step)
    wide = sorted(round(size / SMALL, 1) for size in buffers if size > 4 * SMALL)
    first = 16.1  # with the gates beside it
    assert wide == [8.0] * 2 + [first] * 4
    total = sum(size for _, size in calls)
    print(f"{total:,.0f} MB", [(kernel, round(size)) for kernel, size in calls])
    assert 5200 < total < 5750


def test_bytes_of_a_step_on_hopper(monkeypatch):
    """Between the hidden layers nothing but z and dz goes through memory."""
    from fastmtl.backends.triton import hopper

    monkeypatch.setattr(hopper, "_is_here", lambda device: True)
    calls, buffers = moved(ali_ccp_step)
    wide = sorted(round(size / SMALL, 1) for size in buffers if size > 4 * SMALL)
    assert wide == [8.0] * 2 + [16.1] * 2
    total = sum(size for _, size in calls)
    print(f"{total:,.0f} MB", [(kernel, round(size)) for kernel, size in calls])
    assert 3600 < total < 3950
