"""The sparse form of embedding_bag's backward: the dense one's rows, bit for bit, and no others."""

import pytest
import torch

from fastmtl.backends import eager, native

from .lookups import random_batch

CASES = 60


def sparse(batch, needs=None):
    needs = [True] * len(batch.shapes) if needs is None else needs
    index = native.embedding_bag_index(batch.ids, batch.columns, batch.spec, batch.shapes, needs)
    return native.embedding_bag_bwd_sparse(batch.grad, batch.ids, batch.columns, batch.spec, batch.shapes, index)


def looked_up(batch, table):
    """The rows of a weight that its bags read, by a loop over the ids."""
    rows = set()
    for f, bag in enumerate(batch.spec.bags):
        if bag.table != table:
            continue
        for number in batch.ids[:, batch.columns[f] : batch.columns[f + 1]].flatten().tolist():
            if number in bag.padding:
                continue
            if not 0 <= number < bag.vocab:
                if bag.oov == "zero":
                    continue
                number = bag.oov
            rows.add(bag.offset + number)
    return sorted(rows)


def test_rows_and_values_are_the_dense_gradient(seed):
    for case in range(seed, seed + CASES):
        batch = random_batch(case)
        needs = [True] * len(batch.shapes)
        dense = native.embedding_bag_bwd(batch.grad, batch.ids, batch.columns, batch.spec, batch.shapes, needs)
        for table, (full, (rows, values)) in enumerate(zip(dense, sparse(batch), strict=True)):
            assert rows.tolist() == looked_up(batch, table), case
            assert torch.equal(values, full[rows]), case
            rest = full.clone()
            rest[rows] = 0
            assert not rest.any(), case


def test_eager_agrees(seed):
    for case in range(seed, seed + CASES):
        batch = random_batch(case)
        grad = batch.grad.double()
        needs = [True] * len(batch.shapes)
        reference = eager.embedding_bag_bwd_sparse(grad, batch.ids, batch.columns, batch.spec, batch.shapes, needs)
        for (rows, values), (right_rows, right) in zip(sparse(batch), reference, strict=True):
            assert torch.equal(rows, right_rows), case
            torch.testing.assert_close(values.double(), right, rtol=1e-5, atol=1e-4, msg=f"case {case}")


def test_the_number_of_threads_changes_nothing(seed, threads):
    for case in range(seed, seed + 20):
        batch = random_batch(case)
        results = []
        for n in (1, 2, 3):
            threads(n)
            results.append(sparse(batch))
        for other in results[1:]:
            for (rows, values), (right_rows, right) in zip(other, results[0], strict=True):
                assert torch.equal(rows, right_rows), case
                assert torch.equal(values, right), case


def test_only_wanted_gradients_are_made(seed):
    for case in range(seed, seed + 10):
        batch = random_batch(case)
        needs = [table % 2 == 0 for table in range(len(batch.shapes))]
        everything = sparse(batch)
        for need, some, full in zip(needs, sparse(batch, needs), everything, strict=True):
            assert (some is None) != need
            assert some is None or (torch.equal(some[0], full[0]) and torch.equal(some[1], full[1]))


def test_a_malformed_index_is_refused():
    batch = random_batch(1)
    index = native.embedding_bag_index(batch.ids, batch.columns, batch.spec, batch.shapes, [True] * len(batch.shapes))
    broken = [found._replace(starts=found.starts + 1) for found in index]
    with pytest.raises(RuntimeError, match="malformed index"):
        native.embedding_bag_bwd_sparse(batch.grad, batch.ids, batch.columns, batch.spec, batch.shapes, broken)
