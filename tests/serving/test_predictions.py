"""What packed models predict: the numbers of eager in float64, row by row, for every batch, thread and build."""

import os
import random
import subprocess
import sys
import threading

import pytest
import torch
from devices import call, place

from fastmtl.serving import Predictor

from .models import exact, lively_model

#: Of 1 + |prediction|; measured over 300 random models: 8e-8 and 2.2e-3.
FP32, BF16 = 1e-5, 1e-2
CASES = 10 if os.environ.get("FASTMTL_ISA") else 60
#: Predictions of each of the 16 threads; the soak is FASTMTL_PREDICTIONS=10000.
PREDICTIONS = int(os.environ.get("FASTMTL_PREDICTIONS", "40"))


def test_random_models():
    for index in range(CASES):
        case, model, x = lively_model(10_000 + index)
        want = exact(model, x)
        for precision, bound in (("fp32", FP32), ("bf16", BF16)):
            got = Predictor(model, precision)(x)
            assert got.dtype is torch.float32
            error = ((got - want).abs() / (1 + want.abs())).max()
            assert error <= bound, f"{precision}: {error} in {case}"


def test_the_model_itself_predicts_so(backend):
    for index in range(10):
        _, model, x = lively_model(index)
        model = place(model)
        with torch.no_grad():
            got = call(model, x)
        if backend == "native":
            assert torch.equal(got, Predictor(model)(x))
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                assert torch.equal(model(x), Predictor(model, "bf16")(x))
        with torch.enable_grad():
            torch.testing.assert_close(call(model, x).detach(), got, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_does_not_depend_on_its_batch(precision, threads, seed):
    rng = random.Random(seed)
    for index in range(CASES // 5):
        _, model, x = lively_model(index)
        predictor = Predictor(model, precision)
        threads(1)
        whole = predictor(x)
        n_rows = len(whole)
        for n in (2, 3):
            threads(n)
            assert torch.equal(predictor(x), whole)
        for n in (0, 1, 2, rng.randrange(1, n_rows + 1)):
            first = rng.randrange(n_rows - n + 1)
            part = {name: column[first : first + n] for name, column in x.items()}
            assert torch.equal(predictor(part), whole[first : first + n])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_large_batch_on_several_threads(precision, threads, seed):
    """Large enough that threads are woken and tiles are dealt."""
    model, x = wide_model(seed, 1500)
    predictor = Predictor(model, precision)
    threads(1)
    whole = predictor(x)
    want = exact(model, x)
    assert ((whole - want).abs() / (1 + want.abs())).max() <= (FP32 if precision == "fp32" else BF16)
    for n in (2, 3, 5):
        threads(n)
        assert torch.equal(predictor(x), whole)
    assert torch.equal(predictor({name: column[1400:] for name, column in x.items()}), whole[1400:])


def wide_model(seed, n_rows):
    from fastmtl.basic.features import DenseFeature, SparseFeature
    from fastmtl.models import PLE

    from .models import enliven

    torch.manual_seed(seed)
    features = [*(SparseFeature(f"s{i}", 500, embed_dim=16) for i in range(8)), DenseFeature("d")]
    towers = [{"dims": [32]}, {"dims": [16, 8]}]
    model = PLE(features, ["classification", "regression"], 2, 2, 1, {"dims": [272, 48]}, towers).eval()
    enliven(model, torch.Generator().manual_seed(seed))
    x = {f"s{i}": torch.randint(0, 500, (n_rows,)) for i in range(8)} | {"d": torch.randn(n_rows)}
    return model, x


def test_sixteen_threads_at_once(seed):
    """Mixed sizes from 16 threads, bit for bit what one thread gets."""
    jobs = []
    for index in range(6):
        _, model, x = lively_model(index)
        predictor = Predictor(model, "bf16" if index % 2 else "fp32")
        n_rows = len(next(iter(x.values())))
        for n in (1, 2, 17, n_rows):
            part = {name: column[: min(n, n_rows)] for name, column in x.items()}
            jobs.append((predictor, part, predictor(part)))
    wrong = []

    def work(number):
        rng = random.Random(seed + number)
        for _ in range(PREDICTIONS):
            predictor, part, want = rng.choice(jobs)
            if not torch.equal(predictor(part), want):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_each_build(isa):
    """Random models on each build but the one that runs anyway; one that this processor lacks falls back."""
    if os.environ.get("FASTMTL_ISA") or isa == torch.ops.fastmtl.gemm_isa.default():
        pytest.skip("every other test runs on it")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "FASTMTL_ISA": isa}
    done = subprocess.run([*command, "-k", "random or its_batch"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
