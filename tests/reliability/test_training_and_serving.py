"""Samples of rows 4, 15 and 16: the same weights from fresh processes, many threads, no leaks."""

import pytest
import torch
from devices import DEVICE, KERNELS

from fastmtl.models.multi_task.aitm import AIT

from . import leaks, repeatability, threads


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "triton" or DEVICE.type != "cpu"])
def test_the_same_weights_from_fresh_processes(name, seed):
    repeatability.check("PLE", "AdamW", "fp32", name, seed)


@pytest.mark.parametrize("batch", [1, 3, 40, 1000])
def test_attention_has_the_same_bits_for_every_number_of_threads(batch, seed):
    """torch's product has not, where its sums are cut by the number of threads: three and more, on some processors."""
    torch.manual_seed(seed)
    own, info, ait = torch.randn(batch, 20), torch.randn(batch, 20), AIT(20)
    n_threads, found = torch.get_num_threads(), []

    def run():
        a, b = own.clone().requires_grad_(), info.clone().requires_grad_()
        out = ait(a, b)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), (a, b, ait.qkv))]

    plain = run()
    torch.use_deterministic_algorithms(True)
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            found.append(run())
    finally:
        torch.set_num_threads(n_threads)
        torch.use_deterministic_algorithms(False)
    for other in found:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))
        for one, two in zip(plain, other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()) + 1e-7)


@pytest.mark.parametrize("name", ["MMOE", "PLE"])
def test_many_threads_predict_what_one_does(name, seed, cpu_backend):
    threads.check(name, 25, seed)


def test_memory_stays_flat(seed):
    leaks.check_steps(600, seed)
    leaks.check_predictions(1200, seed)
    leaks.check_saves(60, seed)
