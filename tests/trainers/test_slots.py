"""Places for batches: what is written into them, plain and recorded, is the batch that the loader would yield."""

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, WeightedRandomSampler

from fastmtl.basic.features import DenseFeature, SequenceFeature, SparseFeature
from fastmtl.data.datasets import TorchDataset
from fastmtl.data.loader import ColumnLoader
from fastmtl.data.resident import ResidentLoader
from fastmtl.models import ESMM, MMOE
from fastmtl.trainers.recorders import Recordings
from fastmtl.trainers.slots import Layouts, Slots
from fastmtl.trainers.streams import Inline

FEATURES = [
    SparseFeature("user", 40, 4),
    SequenceFeature("seen", 40, 4, pooling="mean", shared_with="user", padding_idx=0),
    SparseFeature("item", 7, 4),
    DenseFeature("age"),
]
CPU = torch.device("cpu")


class Noting:
    """A recorder that counts; what it records is the work itself."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def record(self, work):
        self.recorded += 1

        def replay():
            self.replayed += 1
            work()

        return replay


def dataset(seed, n=101):
    rng = np.random.default_rng(seed)
    x = {
        "age": rng.random(n, dtype=np.float32),
        "item": rng.integers(0, 7, n),
        "user": rng.integers(0, 40, n),
        "seen": rng.integers(0, 40, (n, 3)),
    }
    return TorchDataset(x, rng.integers(0, 2, (n, 2)).astype(np.float32))


def loaders(seed):
    data = dataset(seed)
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randperm(101, generator=rng)[:70]
    weights = torch.rand(101, generator=rng)
    return {
        "shuffled": lambda: ColumnLoader(data, 16, shuffle=True),
        "in order": lambda: ColumnLoader(data, 16),
        "a subset": lambda: ColumnLoader(Subset(data, rows), 16, shuffle=True),
        "a subset in order": lambda: ColumnLoader(Subset(data, rows), 16),
        "a sampler": lambda: ColumnLoader(data, 16, sampler=WeightedRandomSampler(weights, 90)),
    }


def make(seed, kind=MMOE):
    torch.manual_seed(seed)
    if kind is ESMM:
        return ESMM(FEATURES[:2], FEATURES[2:], {"dims": [6]}, {"dims": [6]})
    return MMOE(FEATURES, ["classification"] * 2, 2, {"dims": [6]}, [{"dims": [4]}] * 2)


@pytest.mark.parametrize("kind", [MMOE, ESMM])
@pytest.mark.parametrize("name", loaders(0))
def test_a_recorded_place_holds_the_loader_s_batch(name, kind, seed):
    model, recorder = make(seed, kind), Noting()
    slots = Slots(CPU, model, None, True, Recordings(recorder, ""), Inline())
    loader = loaders(seed)[name]()
    held = ResidentLoader(loader, CPU)
    for epoch in range(4):  # the last batch of an epoch has its places filled twice
        torch.manual_seed(seed + epoch)
        right = list(loader)
        torch.manual_seed(seed + epoch)
        for (x, y), batch in zip(right, held.batches(), strict=True):
            slot = slots.fill(batch)
            ids, columns, dense = model.embedding.inputs(x, model.embedding.features)
            assert torch.equal(slot.x.ids, ids)
            assert slot.x.columns == columns
            assert torch.equal(slot.x.dense, dense)
            assert torch.equal(slot.labels, model.adapt_labels(y))
    places = len(slots.live())
    n_filled = 4 * len(right)
    assert recorder.recorded == places, "once for each place"
    assert recorder.replayed == n_filled - places, "all but the first time"


def test_columns_of_others_are_not_what_was_recorded(seed):
    """Batches of the same shape and layout that were made elsewhere, and those of another data set."""
    model, recorder = make(seed), Noting()
    slots = Slots(CPU, model, None, True, Recordings(recorder, ""), Inline())
    held, other = (ResidentLoader(ColumnLoader(dataset(s), 16, drop_last=True), CPU) for s in (seed, seed + 1))
    for _ in range(2):
        for batch in held.batches():
            slots.fill(batch)
    replayed = recorder.replayed
    assert replayed == 10
    for x, y in other:
        x.layout = held.layout  # as if it were a list of the first one's batches
        slot = slots.fill(Layouts().given(x, y))
        assert torch.equal(slot.labels, y)
        assert torch.equal(slot.x.dense[:, 0], x["age"])
    assert recorder.replayed == replayed
    for batch in other.batches():
        y = batch.make()[1]
        assert torch.equal(slots.fill(batch).labels, y)


def test_columns_on_the_host_are_cut_as_they_are(seed):
    recorder = Noting()
    slots = Slots(CPU, make(seed), None, True, Recordings(recorder, ""), Inline())
    held = ResidentLoader(ColumnLoader(dataset(seed), 16), CPU, budget=0)
    for _ in range(2):
        for batch in held.batches():
            assert torch.equal(slots.fill(batch).labels, batch.make()[1])
    assert recorder.recorded == 0


@pytest.mark.parametrize("is_quiet", [False, True])
def test_where_recording_is_refused_batches_are_cut_as_they_are(is_quiet, seed, capsys):
    class Refusing:
        asked = 0

        def record(self, work):
            self.asked += 1
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    recorder = Refusing()
    fills = Recordings(recorder, "batches are cut", is_quiet)
    slots = Slots(CPU, make(seed), None, True, fills, Inline())
    held = ResidentLoader(ColumnLoader(dataset(seed), 16), CPU)
    for _ in range(2):
        for batch in held.batches():
            assert torch.equal(slots.fill(batch).labels, batch.make()[1])
    assert recorder.asked == 1
    said = "fastmtl: batches are cut without CUDA graphs: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().err == ("" if is_quiet else said)


@pytest.mark.parametrize("piece", [1, 40, 10**6])
def test_numbers_are_sent_in_pieces(piece, seed, monkeypatch):
    """A batch's lie next to each other whatever the pieces are."""
    monkeypatch.setattr("fastmtl.data.resident.PIECE", piece)
    loader = ColumnLoader(dataset(seed), 16, shuffle=True)
    torch.manual_seed(seed)
    right = list(loader.row_batches())
    torch.manual_seed(seed)
    found = [batch.rows for batch in ResidentLoader(loader, CPU).batches()]
    assert [len(rows) for rows in found] == [len(rows) for rows in right]
    assert torch.equal(torch.cat(found), torch.cat(right).int())
    storages = {rows.untyped_storage().data_ptr() for rows in found}
    n_sent = {1: 7, 40: 5, 10**6: 4}[piece]  # of batches: 1 each; 1, 1, 2, 2, 1; 1, 1, 2, 3
    assert len(storages) == n_sent
