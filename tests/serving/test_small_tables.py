"""Tables of few rows, folded into the layers that read them: the numbers, bits and errors are those of a lookup."""

import numpy as np
import pytest
import torch

from fastmtl import optim
from fastmtl.backends import native
from fastmtl.basic.features import DenseFeature, SparseFeature
from fastmtl.errors import BadIdError
from fastmtl.models import AITM, MMOE, PLE, SharedBottom
from fastmtl.models.multi_task.packed import Packed
from fastmtl.serving import Predictor

from .models import enliven, exact

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="needs the native library")
PAYS_IN_BF16 = native.unavailable() is None and torch.ops.fastmtl.gemm_isa() != "amx"


@pytest.fixture
def rng(seed):
    return np.random.default_rng(seed)


def random_model(rng):
    """A model over small and large tables in any order, of several widths, with padding, unknown ids and sharing."""
    features = []
    for i in range(int(rng.integers(2, 9))):
        dim, vocab = int(rng.choice([4, 8, 16, 24])), int(rng.choice([1, 2, 5, 31, 64, 400]))
        oov = ["raise", "zero", int(rng.integers(0, vocab))][rng.integers(0, 3)]
        padding = int(rng.integers(0, vocab)) if rng.random() < 0.3 else None
        features.append(SparseFeature(f"f{i}", vocab, dim, padding_idx=padding, oov=oov))
    features.append(SparseFeature("twin", features[0].vocab_size, features[0].embed_dim, shared_with="f0"))
    features += [DenseFeature(f"d{i}") for i in range(int(rng.integers(0, 3)))]
    features = [features[i] for i in rng.permutation(len(features))]
    expert, towers = {"dims": [int(n) for n in rng.integers(1, 40, 2)]}, [{"dims": [7]}] * 2
    kinds = ["classification"] * 2
    make = [
        lambda: MMOE(features, kinds, int(rng.integers(1, 5)), expert, towers),
        lambda: PLE(features, kinds, 2, 2, 1, expert, towers),
        lambda: SharedBottom(features, kinds, expert, towers),
        lambda: AITM(features, 2, expert, towers),
    ][rng.integers(0, 4)]
    model = make().eval()
    enliven(model, torch.Generator().manual_seed(int(rng.integers(1 << 30))))
    return model


def random_batch(rng, model, n):
    dtype = rng.choice(["int64", "int32"])
    x = {}
    for feature in model.features:
        if isinstance(feature, DenseFeature):
            x[feature.name] = torch.from_numpy(rng.standard_normal(n).astype(np.float32))
        else:
            low, high = (0, feature.vocab_size) if feature.oov == "raise" else (-2, feature.vocab_size + 3)
            x[feature.name] = torch.from_numpy(rng.integers(low, high, n).astype(dtype))
    return x


def test_predictions_are_those_of_lookups(seed):
    folded = 0
    for case in range(40):
        rng = np.random.default_rng([seed, case])
        model, precision = random_model(rng), ["fp32", "bf16"][case % 2]
        predictor = Predictor(model, precision)
        small = predictor._current()._small
        folded += 0 if small is None else len(small)
        x = random_batch(rng, model, int(rng.choice([1, 3, 40, 300])))
        got = predictor(x)
        want = exact(model, x)
        assert ((got - want).abs() / (1 + want.abs())).max() < (1e-5 if precision == "fp32" else 0.01), case
        # a row's bits do not depend on its batch
        row = int(rng.integers(0, len(got)))
        assert torch.equal(predictor({name: column[row : row + 1] for name, column in x.items()}), got[row : row + 1])
    assert folded > (40 if PAYS_IN_BF16 else 20)


def small_model():
    features = [SparseFeature("user", 3000, 16), SparseFeature("kind", 5, 16), SparseFeature("day", 7, 8)]
    model = MMOE([*features, DenseFeature("price")], ["classification"] * 2, 3, {"dims": [16, 8]}, [{"dims": [8]}] * 2)
    enliven(model.eval(), torch.Generator().manual_seed(3))
    return model


def test_only_small_tables_are_folded():
    model = small_model()
    names = [bag.name for bag in model.embedding.spec_of(model.features).bags]
    pack = Packed(model)
    assert [names[int(bag[native.BAG_COLUMN])] for bag in pack._small] == ["kind", "day"]
    assert len(pack._plan) == 1
    assert (Packed(model, bf16=True)._small is not None) == PAYS_IN_BF16


@pytest.mark.parametrize("how", ["in place", "data", "optimizer", "loaded"])
def test_a_changed_table_is_folded_anew(rng, how):
    model = small_model()
    predictor, x = Predictor(model), random_batch(rng, model, 20)
    before = predictor(x)
    tables = model.embedding.weights()
    with torch.no_grad():
        if how == "in place":
            for table in tables:
                table.mul_(-2)
        elif how == "data":
            for table in tables:
                table.data = -2 * table.data
        elif how == "loaded":
            state = model.state_dict()
            model.load_state_dict({k: -2 * v if "embed_dict" in k else v.clone() for k, v in state.items()})
    if how == "optimizer":
        # still in evaluation mode, rows looked up sparsely
        optimizer = optim.SGD(model.parameters(), lr=50.0, tables=tables)
        model.embedding.updater = optimizer
        model(x).sum().backward()
        optimizer.step()
        model.embedding.updater = None
    got = predictor(x)
    assert (got - before).abs().max() > 1e-4
    assert (got - exact(model, x)).abs().max() < 1e-5


def test_an_id_outside_a_folded_table_is_named(rng):
    model = small_model()
    x = random_batch(rng, model, 20)
    x["kind"][7] = 5
    with pytest.raises(BadIdError, match=r"'kind'.*row 7.*\b5\b"):
        Predictor(model)(x)
