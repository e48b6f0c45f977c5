"""The synthetic log: one seed one log in any pieces, with the shape, rates and relatedness asked for; learnable."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from fastmtl.data import SyntheticLog, load_synthetic
from fastmtl.data.synthetic import DENSE, VOCABS
from fastmtl.errors import ConfigError


def test_a_row_is_the_same_in_any_chunk_and_any_run(rng, seed):
    n = 5000
    whole = SyntheticLog(seed).rows(0, n)
    again = SyntheticLog(seed)
    pieces = list(again.chunks(n, chunk_rows=int(rng.integers(1, 999))))
    for name, column in whole.x.items():
        np.testing.assert_array_equal(np.concatenate([piece.x[name] for piece in pieces]), column)
    np.testing.assert_array_equal(np.concatenate([piece.y for piece in pieces]), whole.y)
    np.testing.assert_array_equal(np.concatenate([piece.probabilities for piece in pieces]), whole.probabilities)
    row = int(rng.integers(0, n))
    assert again.rows(row, row + 1).x["205"][0] == whole.x["205"][row]
    other = SyntheticLog(seed + 1).rows(0, n)
    assert (other.x["205"] != whole.x["205"]).mean() > 0.9
    assert (other.y != whole.y).any()


def test_the_shape_is_ali_ccps(seed):
    log = SyntheticLog(seed)
    assert sum(log.vocabs.values()) == sum(VOCABS.values()) == 1_560_498
    rows = log.rows(0, 30_000)
    assert list(rows.x) == [*VOCABS, *DENSE]
    for name, size in VOCABS.items():
        ids = rows.x[name]
        assert ids.dtype == np.int64
        assert ids.min() >= 0
        assert ids.max() < size
        counts = np.sort(np.bincount(ids))[::-1]
        # Skew: the most frequent tenth of the ids (at least one) has far more than a tenth of the rows.
        top = counts[: max(1, size // 10)].sum() / len(ids)
        assert top > 1.3 * max(1, size // 10) / size, name
    for name in DENSE:
        assert rows.x[name].dtype == np.float32
        assert rows.x[name].min() >= 0
        assert rows.x[name].max() <= 1
    assert rows.y.dtype == np.float32
    assert set(np.unique(rows.y)) == {0.0, 1.0}
    assert (rows.y[:, 1] <= rows.y[:, 0]).all()
    small = SyntheticLog(seed, scale=0.01).vocabs
    assert (small["205"], small["121"], small["206"]) == (4673, 98, 100)


@pytest.mark.parametrize(("click_rate", "purchase_rate"), [(0.25, 0.1), (0.04, 0.3)])
def test_rates_and_labels_follow_the_probabilities(seed, click_rate, purchase_rate):
    rows = SyntheticLog(seed, click_rate=click_rate, purchase_rate=purchase_rate).rows(0, 60_000)
    clicks, purchases = rows.probabilities.mean(axis=0)  # of the labels' own luck the bins below know the size
    assert clicks == pytest.approx(click_rate, rel=0.08)
    assert purchases / clicks == pytest.approx(purchase_rate, rel=0.2)
    for task in (0, 1):
        p = rows.probabilities[:, task]
        for low, high in zip(*(lambda q: (q[:-1], q[1:]))(np.quantile(p, [0, 0.5, 0.8, 0.95, 1.0])), strict=True):
            inside = (p >= low) & (p <= high)
            expected, n = p[inside].mean(), inside.sum()
            assert abs(rows.y[inside, task].mean() - expected) < 5 * np.sqrt(expected / n)


def test_the_dial_relates_the_tasks(seed):
    cosines = []
    for relatedness in (0.0, 0.5, 1.0):
        log = SyntheticLog(seed, relatedness=relatedness)
        scores = log._scores(log.rows(0, 20_000).x)
        cosines.append(np.corrcoef(scores.T)[0, 1])
    assert abs(cosines[0]) < 0.4
    assert cosines[0] < cosines[1] < cosines[2]
    assert cosines[2] == pytest.approx(1.0)


def test_splits_and_best_auc(seed):
    data = load_synthetic(20_000, seed, scale=0.01)
    assert [len(split) for split in (data.train, data.valid, data.test)] == [12_000, 4_000, 4_000]
    log = SyntheticLog(seed, scale=0.01).rows(0, 20_000)
    for name, column in log.x.items():
        parts = [split.x[name] for split in (data.train, data.valid, data.test)]
        np.testing.assert_array_equal(np.concatenate(parts), column)
        encoded = data.encoder.transform({n: data.test.x[n] for n in data.test.x})[name]
        np.testing.assert_array_equal(encoded, data.test.x[name])
    for task, name in enumerate(data.task_names):
        expected = roc_auc_score(data.test.y[:, task], data.test.probabilities[:, task])
        assert data.best_auc[name] == pytest.approx(expected, abs=1e-12)
    features = data.model_features(embed_dim=4)
    assert [feature.name for feature in features] == list(log.x)
    assert features[0].vocab_size == SyntheticLog(seed, scale=0.01).vocabs["101"]


def test_a_plain_model_learns_much_and_not_all(seed):
    data = load_synthetic(100_000, seed, scale=0.003)

    def one_hot(split):
        rows = np.arange(len(split))
        columns = [
            csr_matrix((np.ones(len(rows)), (rows, split.x[spec.name])), shape=(len(rows), spec.vocab))
            if spec.vocab
            else csr_matrix(split.x[spec.name][:, None])
            for spec in data.features
        ]
        return hstack(columns).tocsr()

    model = LogisticRegression(C=0.1, solver="liblinear").fit(one_hot(data.train), data.train.y[:, 0])
    reached = roc_auc_score(data.test.y[:, 0], model.predict_proba(one_hot(data.test))[:, 1])
    print(f"logistic regression {reached:.4f}, true probabilities {data.best_auc['click']:.4f}")
    assert 0.6 < reached < data.best_auc["click"]


def test_impossible_values_are_named():
    with pytest.raises(ConfigError, match=r"relatedness is 1.5"):
        SyntheticLog(relatedness=1.5)
    with pytest.raises(ConfigError, match="scale is 0"):
        SyntheticLog(scale=0)
    with pytest.raises(ConfigError, match="click_rate is 1"):
        SyntheticLog(click_rate=1)
    with pytest.raises(ConfigError, match="n_rows is 5"):
        load_synthetic(5)
