"""Small tables folded into the layer that reads them: the numbers of the lookup and the layer one after the other."""

import dataclasses
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastmtl.backends import native
from fastmtl.backends.native_folding import Folding, small_tables
from fastmtl.errors import BadIdError
from fastmtl.spec import Bag, EmbeddingSpec, ExpertGateSpec, Gate

from .accuracy import FLOOR
from .folded_layers import check, folded, random_case, unfolded
from .layers import new_params

CASES = 25 if os.environ.get("FASTMTL_ISA") else 80
EPSILON = 2.0**-8


def test_random_layers(base_seed):
    """As near to float64 as eager is, which multiplies every row."""
    ratios = []
    for i in range(CASES):
        ratios += check(base_seed + i)[0]
    assert math.exp(sum(ratios) / len(ratios)) < 1.2


def test_bf16_is_no_further_from_float64_than_autocast(base_seed):
    ratios = []
    for i in range(CASES):
        case = random_case(base_seed + i, batch=200)
        case.spec = dataclasses.replace(case.spec, activation="tanh")
        case.params = new_params(case.spec, torch.Generator().manual_seed(base_seed + i))
        exact = unfolded(case, torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mine, theirs = folded(case), unfolded(case, torch.float32)
        for part in range(2):
            scales = [float(t.norm()) for t in exact[part]]
            least = 0.05 * max(scales) if part else 0.0
            for a, b, want, scale in zip(mine[part], theirs[part], exact[part], scales, strict=True):
                off = [float((t.double() - want).norm()) / max(scale, least, 1e-30) for t in (a, b)]
                assert math.isfinite(off[0])
                if min(off) > EPSILON / 8:
                    ratios.append(math.log(off[0] / off[1]))
    assert math.exp(sum(ratios) / len(ratios)) < 1.0


@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_for_every_number_of_threads(bf16, threads, base_seed):
    spec = ExpertGateSpec(1, (0,) * 8, (64, 33), dropout=0.2, gates=(Gate(0, tuple(range(8))),) * 2)
    for i in range(6):
        case = random_case(base_seed + i, spec, 1500)
        case.training = True
        results = []
        for n in (1, 2, 3):
            threads(n)
            torch.manual_seed(base_seed)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                results.append([t for part in folded(case) for t in part])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def case_of_many_rows(seed, spec, batch):
    """One whose batch has unlike rows: rows nearly all alike leave nothing but rounding to their normalisation."""
    drawn = (random_case(seed + i, spec, batch) for i in itertools.count())
    return next(case for case in drawn if case.table.shape[1] > 1 and max(rows for *_, rows in case.places) >= 10)


def test_a_row_that_nothing_reads_has_no_gradient(base_seed):
    case = case_of_many_rows(base_seed, ExpertGateSpec(1, (0, 0), (16,)), 300)
    read = torch.zeros(sum(rows for *_, rows in case.places) + 1, dtype=torch.bool)
    case.picks[case.picks % 2 == 0] = len(read) - 1
    read[case.picks.long()] = True
    of_tables = folded(case)[1][1]
    assert bool((of_tables[~read[:-1]] == 0).all())
    assert float(of_tables.abs().max()) > FLOOR


def test_what_no_row_reads_may_be_anything(base_seed):
    """A NaN in an unread row of a table, as a lookup leaves it, reaches nothing."""
    case = random_case(base_seed, ExpertGateSpec(1, (0, 0), (16,), gates=(Gate(0, (0, 1)),)), 300)
    place, first, _ = max(case.places, key=lambda place: place[2])
    start = sum(n for at, _, n in case.places if at < place)
    case.picks[case.picks == start] = sum(n for *_, n in case.places)
    want = folded(case)
    case.table[first] = torch.nan
    for part, other in zip(folded(case), want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, other, strict=True))
        assert all(bool(t.isfinite().all()) for t in part)


@pytest.mark.parametrize("bf16", [False, True])
def test_nothing_but_folded_tables(bf16, base_seed):
    spec = ExpertGateSpec(1, (0, 0, 0), (40, 8), "tanh", gates=(Gate(0, (0, 1, 2)),))
    case = case_of_many_rows(base_seed, spec, 200)
    dim, n = case.table.shape[1], len(case.places)
    case.places = [(t * dim, first, rows) for t, (_, first, rows) in enumerate(case.places)]
    case.spec = dataclasses.replace(case.spec, in_features=n * dim)
    case.params = new_params(case.spec, torch.Generator().manual_seed(base_seed))
    case.x, case.training = torch.empty(200, 0), True
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        mine = folded(case)
    for part, exact in zip(mine, unfolded(case, torch.float64), strict=True):
        largest = max(float(t.norm()) for t in exact)
        for got, want in zip(part, exact, strict=True):
            assert float((got.double() - want).norm()) <= (0.1 if bf16 else 1e-4) * largest


def test_what_does_not_fit_is_refused():
    spec = ExpertGateSpec(10, (0, 0), (8,))
    params = new_params(spec, torch.Generator().manual_seed(0))
    table, x, good = torch.zeros(5, 3), torch.zeros(1, 4, 4), [[1, 0, 2], [4, 2, 3]]
    picks = torch.tensor([[0, 2], [1, 3], [0, 4], [5, 5]]).int()

    def call(places: list[list[int]], table: Tensor, picks: Tensor, x: Tensor = x) -> None:
        native.expert_gate_fwd(x, params, spec, True, native.Folded(torch.tensor(places), table, picks))

    call(good, table, picks)
    for places in ([[1, 0, 2], [3, 2, 3]], [[1, 0, 2], [8, 2, 3]], [[1, -1, 2], [4, 2, 3]], [[1, 0, 2], [4, 3, 3]]):
        with pytest.raises(RuntimeError):
            call(places, table, picks)
    for wrong in (picks + 1, picks - 1, picks[:3], picks[:, :1], picks.long(), picks.t().contiguous().t()):
        with pytest.raises(RuntimeError):
            call(good, table, wrong)
    for wrong in (table.double(), table[:4], table.t().contiguous().t(), torch.zeros(5, 4)):
        with pytest.raises(RuntimeError):
            call(good, wrong, picks)
    with pytest.raises(RuntimeError, match="x must be"):
        call(good, table, picks, torch.zeros(1, 4, 10))


BAGS = (
    Bag("a", 0, 0, 7, 8),
    Bag("big", 0, 7, 5000, 8),
    Bag("b", 0, 5007, 12, 8, padding=(3,)),
    Bag("again", 0, 0, 7, 8, oov="zero"),  # the table of "a"
    Bag("other", 1, 0, 9, 16),
)
SPEC, COLUMNS = EmbeddingSpec(BAGS, 2), (0, 1, 2, 3, 4, 5)


def test_a_folded_lookup_with_shared_tables_and_padding(base_seed):
    """Rows, and gradients of both kinds, are the plain lookup's."""
    generator = torch.Generator().manual_seed(base_seed)
    n = 300
    ids = torch.stack([torch.randint(0, bag.vocab, (n,), generator=generator) for bag in BAGS], 1)
    ids[:20, 3] = 99
    weights = [torch.randn(5019, 8, generator=generator), torch.randn(9, 16, generator=generator)]
    dense = torch.randn(n, 2, generator=generator)
    folding = Folding.of(SPEC, COLUMNS, ExpertGateSpec(50, (0,), (8,)), False)
    rows, given = folding.look_up(weights, ids, dense)
    whole = native.embedding_bag_fwd(weights, ids, COLUMNS, dense, SPEC)
    assert given.places.tolist() == [[0, 0, 7], [16, 5007, 12], [24, 0, 7]]  # of one width, the larger table apart
    kept = [*range(8, 16), *range(32, 50)]
    assert torch.equal(rows, whole[:, kept])
    counted = torch.cat([weights[0][at : at + v] for _, at, v in given.places.tolist()] + [torch.zeros(1, 8)])
    for t, (column, *_) in enumerate(given.places.tolist()):
        assert torch.equal(counted[given.picks[:, t].long()], whole[:, column : column + 8])

    grad = torch.randn(whole.shape, generator=generator)
    of_small = torch.zeros(len(counted), 8)
    for t, (column, *_) in enumerate(given.places.tolist()):
        of_small.index_add_(0, given.picks[:, t], grad[:, column : column + 8])
    shapes, needs = [w.shape for w in weights], [True, True]
    arguments = grad[:, kept].contiguous(), of_small[:-1], ids, shapes, needs
    found = folding.table_gradients(*arguments, None)
    for mine, want in zip(found, native.embedding_bag_bwd(grad, ids, COLUMNS, SPEC, shapes, needs), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)
    index = native.embedding_bag_index(ids, COLUMNS, SPEC, shapes, needs)
    plain = native.embedding_bag_bwd_sparse(grad, ids, COLUMNS, SPEC, shapes, index)
    for mine, want in zip(folding.table_gradients(*arguments, index), plain, strict=True):
        assert torch.equal(mine[0], want[0])
        torch.testing.assert_close(mine[1], want[1], rtol=1e-5, atol=1e-5)
    for column, value in ((0, 7), (1, 5000), (2, -1)):
        wrong = ids.clone()
        wrong[5, column] = value
        with pytest.raises(BadIdError, match=f"'{BAGS[column].name}'.*{value}"):
            folding.look_up(weights, wrong, dense)


@pytest.mark.parametrize(
    ("isa", "bf16", "tables", "dim", "training", "predicting"),
    [
        ("avx512_bf16", False, 32, 4, True, True),  # census
        ("avx512_bf16", True, 32, 4, True, True),
        ("amx", True, 32, 4, False, False),
        ("avx2", True, 7, 5, True, True),  # aliexpress
        ("avx512_bf16", False, 7, 5, True, True),
        ("avx512_bf16", True, 7, 5, False, True),
        ("amx", False, 1, 16, True, True),
        ("avx512_bf16", True, 1, 16, False, True),
        ("avx2", False, 9, 1, False, False),
    ],
)
def test_tables_are_folded_where_it_pays(isa, bf16, tables, dim, training, predicting, monkeypatch):
    monkeypatch.setattr(torch.ops.fastmtl, "gemm_isa", lambda: isa)
    bags = [Bag(f"f{i}", 0, 16 * dim * i, 16 * dim - i % 2, dim) for i in range(tables)]
    spec = EmbeddingSpec((*bags, Bag("tall", 0, 10**4, 16 * dim + 1, dim), Bag("list", 0, 0, 5, dim, "mean")), 3)
    whole = list(range(min(tables, 1024 // (16 * dim))))
    assert len(small_tables(spec, bf16, training=True)) == len(whole) * training
    assert len(small_tables(spec, bf16)) == len(whole) * predicting
    assert small_tables(spec, bf16, among=range(tables, tables + 2)) == []


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_each_build(isa):
    """One that this processor lacks falls back to the best one before it."""
    if "FASTMTL_ISA" in os.environ:
        pytest.skip("one build was asked for")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "random or bf16"]
    environment = {**os.environ, "FASTMTL_ISA": isa}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
