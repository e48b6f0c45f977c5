"""A synthetic log shaped like Ali-CCP, whose true probabilities are known.

An impression has 23 ids, skewed as in a real log, and 8 numbers. Each id and each number pushes a hidden point z in the
plane; a task reads it along its own direction, as in the construction of the MMoE paper (Ma et al., KDD'18, section
3.2):

    w_click = u1,  w_purchase = p u1 + sqrt(1 - p^2) u2          (unit vectors, their cosine p is the relatedness)
    logit_t = gain (w_t z + mean over i of sin(alpha_i w_t z + beta_i)) + base rate

The paper's inputs live in more dimensions, of which only u1 and u2 matter; here just these two are made. A click is
drawn from its probability, a purchase only where there is a click.

Every number is a hash of (seed, row, column), so that a row is the same whichever rows are made with it; what an id
does is a hash of (seed, feature, id), so that no table is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..basic.metric import auc
from ..errors import ConfigError
from .encoder import Encoder
from .multitask import MultiTaskData, Split

#: Ali-CCP's sparse features with their vocabularies: user (101 to 129), item (205 to 216), combinations, context (301).
VOCABS = {
    "101": 238635,
    "121": 98,
    "122": 14,
    "124": 3,
    "125": 8,
    "126": 4,
    "127": 4,
    "128": 3,
    "129": 5,
    "205": 467298,
    "206": 6929,
    "207": 263942,
    "210": 80232,
    "216": 106399,
    "508": 5888,
    "509": 104830,
    "702": 51878,
    "853": 37148,
    "301": 4,
    "109_14": 5853,
    "110_14": 105622,
    "127_14": 53843,
    "150_14": 31858,
}
DENSE = ("D109_14", "D110_14", "D127_14", "D150_14", "D508", "D509", "D702", "D853")
TASKS = ("click", "purchase")

_GAIN = 1.5
#: Share of the hidden point's variance that the numbers bring; the ids bring the rest.
_DENSE_SHARE = 0.2
#: The sines' frequencies; their phases come from the seed.
_ALPHAS = (1.0, 2.0, 3.0)
#: Rows from which base rates are set. They are no rows of the log, and the same however long it is.
_PILOT_ROWS = 50_000
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Rows:
    """Some rows of the log.

    Args:
        x: feature -> ids (int64) or numbers (float32), [N] each.
        y: click and purchase [N, 2], float32.
        probabilities: the probabilities they were drawn from [N, 2], float64 (of click, and of click and purchase).
    """

    x: dict[str, np.ndarray]
    y: np.ndarray
    probabilities: np.ndarray


class SyntheticLog:
    """An endless log of impressions, clicks and purchases.

    Args:
        seed: every number follows from it.
        relatedness: cosine between the tasks' directions, 0 (apart) to 1 (one).
        scale: what to multiply the vocabularies with (those below 100 stay): 1 for Ali-CCP's, less for a log that few
            rows suffice to learn.
        click_rate: share of impressions with a click.
        purchase_rate: share of clicks with a purchase.

    Raises:
        ConfigError: for a value out of range.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        relatedness: float = 0.8,
        scale: float = 1.0,
        click_rate: float = 0.25,
        purchase_rate: float = 0.1,
    ) -> None:
        if not 0 <= relatedness <= 1:
            raise ConfigError(f"relatedness is {relatedness}; it is between 0 (tasks apart) and 1 (one task).")
        if not 0 < scale <= 1:
            raise ConfigError(f"scale is {scale}; it is above 0, and 1 for Ali-CCP's own vocabularies.")
        for name, rate in (("click_rate", click_rate), ("purchase_rate", purchase_rate)):
            if not 0 < rate < 1:
                raise ConfigError(f"{name} is {rate}; it is between 0 and 1, both excluded.")
        self.seed = seed
        self.relatedness = float(relatedness)
        self.vocabs = {name: size if size < 100 else max(100, round(size * scale)) for name, size in VOCABS.items()}
        self._directions = ((1.0, 0.0), (self.relatedness, (1.0 - self.relatedness**2) ** 0.5))
        self._phases = 2 * np.pi * _uniform(_key(seed, "phases"), np.arange(len(_ALPHAS)))
        self._shift, self._spread, self._base = np.zeros(2), 1.0, np.zeros(2)
        self._fit_base_rates(click_rate, purchase_rate)

    def rows(self, start: int, stop: int) -> Rows:
        """Rows start to stop - 1 of the log, the same whatever is asked for beside them.

        Args:
            start: first row, at least 0.
            stop: the row after the last.

        Returns:
            stop - start rows.
        """
        numbers = np.arange(start, stop)
        x = self._features("log", numbers)
        click, purchase = (_sigmoid(self._scores(x) + self._base)).T
        clicked = _uniform(_key(self.seed, "log", "click"), numbers) < click
        bought = clicked & (_uniform(_key(self.seed, "log", "purchase"), numbers) < purchase)
        labels = np.stack([clicked, bought], axis=1).astype(np.float32)
        return Rows(x, labels, np.stack([click, click * purchase], axis=1))

    def chunks(self, n_rows: int, chunk_rows: int = 65_536) -> Iterator[Rows]:
        """The first rows of the log, piece by piece, so that a log longer than memory can be written out.

        Args:
            n_rows: rows in all.
            chunk_rows: rows in a piece.

        Yields:
            ``Rows``, the last of them maybe shorter.
        """
        for start in range(0, n_rows, chunk_rows):
            yield self.rows(start, min(start + chunk_rows, n_rows))

    def _features(self, stream: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        x: dict[str, np.ndarray] = {}
        for place, (name, size) in enumerate(self.vocabs.items()):
            rank = _zipf(_uniform(_key(self.seed, stream, name), rows), size, 0.7 + 0.1 * (place % 5))
            # In a real log the frequent ids are not the small ones. The step is coprime to the size: a permutation.
            x[name] = (rank * _coprime_near(size, 0.618) + place) % size
        for name in DENSE:
            # Counts and rates of a log crowd near 0.
            x[name] = (_uniform(_key(self.seed, stream, name), rows) ** 3).astype(np.float32)
        return x

    def _scores(self, x: dict[str, np.ndarray]) -> np.ndarray:
        """Each task's logit [N, 2] before its base rate."""
        first, second = ((self._hidden_points(x) - self._shift) / self._spread).T
        # Not a matrix product, whose rounding may depend on how many rows there are.
        points = np.stack([a * first + b * second for a, b in self._directions], axis=1)
        waves = np.mean([np.sin(a * points + b) for a, b in zip(_ALPHAS, self._phases, strict=True)], axis=0)
        return _GAIN * (points + waves)

    def _hidden_points(self, x: dict[str, np.ndarray]) -> np.ndarray:
        """z [N, 2], the sum of what ids and numbers do."""
        points = np.zeros((len(next(iter(x.values()))), 2))
        n_sparse, n_dense = len(self.vocabs), len(DENSE)
        for axis in (0, 1):
            for name in self.vocabs:
                effect = _uniform(_key(self.seed, "effect", name, axis), x[name]) - 0.5
                points[:, axis] += effect * np.sqrt(12 * (1 - _DENSE_SHARE) / n_sparse)
            for name in DENSE:
                sign = np.sign(_uniform(_key(self.seed, "effect", name, axis), np.zeros(1, np.int64)) - 0.5)
                # 0.25 and 0.283 are mean and deviation of the cube of a uniform number.
                points[:, axis] += sign * (x[name] - 0.25) / 0.283 * np.sqrt(_DENSE_SHARE / n_dense)
        return points

    def _fit_base_rates(self, click_rate: float, purchase_rate: float) -> None:
        """Centre the hidden points and find the logits' offsets on the pilot rows."""
        x = self._features("pilot", np.arange(_PILOT_ROWS))
        points = self._hidden_points(x)
        self._shift, self._spread = points.mean(axis=0), float(points.std(axis=0).mean())
        click, purchase = self._scores(x).T
        base_click = _offset_for(click, np.ones(len(click)), click_rate)
        self._base = np.array([base_click, _offset_for(purchase, _sigmoid(click + base_click), purchase_rate)])


def load_synthetic(
    n_rows: int = 200_000,
    seed: int = 0,
    *,
    relatedness: float = 0.8,
    scale: float = 0.001,
    click_rate: float = 0.25,
    purchase_rate: float = 0.1,
) -> MultiTaskData:
    """The first rows of a synthetic log as a data set: six parts of ten for training, two for validation, two for test.

    Args:
        n_rows: rows in all, at least 10.
        seed: see ``SyntheticLog``, as the arguments below.
        relatedness: cosine between the tasks' directions.
        scale: what to multiply Ali-CCP's vocabularies with; with the default few rows suffice to learn every id.
        click_rate: share of impressions with a click.
        purchase_rate: share of clicks with a purchase.

    Returns:
        The data set: 23 sparse and 8 dense features, tasks "click" and "purchase", the true probabilities and their
        AUC.

    Raises:
        ConfigError: for a value out of range.
    """
    if n_rows < 10:
        raise ConfigError(f"n_rows is {n_rows}; a log that is split needs at least 10.")
    log = SyntheticLog(seed, relatedness=relatedness, scale=scale, click_rate=click_rate, purchase_rate=purchase_rate)
    pieces = list(log.chunks(n_rows))
    x = {name: np.concatenate([piece.x[name] for piece in pieces]) for name in pieces[0].x}
    y = np.concatenate([piece.y for piece in pieces])
    probabilities = np.concatenate([piece.probabilities for piece in pieces])
    bounds = [0, n_rows * 6 // 10, n_rows * 8 // 10, n_rows]
    train, valid, test = (
        Split({name: column[a:b] for name, column in x.items()}, y[a:b], probabilities[a:b])
        for a, b in pairwise(bounds)
    )
    test_probabilities = probabilities[bounds[2] :]
    return MultiTaskData(
        name="synthetic",
        train=train,
        valid=valid,
        test=test,
        task_names=TASKS,
        task_types=("classification",) * 2,
        encoder=Encoder.for_ids(log.vocabs, DENSE),
        best_auc={name: auc(test.y[:, t], test_probabilities[:, t]) for t, name in enumerate(TASKS)},
        note=f"synthetic log, {n_rows:,} rows, seed {seed}, relatedness {relatedness}, vocabularies x {scale}",
    )


def _mix(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA'14): 64 bits in, 64 well-mixed bits out."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _key(seed: int, *names: object) -> np.ndarray:
    """A 64-bit key [1] for one stream of numbers."""
    key = _mix(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)
    for byte in "/".join(map(str, names)).encode():
        key = _mix(key * _GOLDEN + np.uint64(byte + 1))
    return key


def _uniform(key: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) [N], one for each counter."""
    return (_mix(counters.astype(np.uint64) * _GOLDEN + key) >> np.uint64(11)) * 2.0**-53


def _zipf(uniform: np.ndarray, size: int, exponent: float) -> np.ndarray:
    """Ranks 0 to size - 1 whose frequency falls as rank ** -exponent, by the inverse of the continuous law."""
    power = 1.0 - exponent
    if abs(power) < 1e-9:
        ranks = (size + 1.0) ** uniform
    else:
        ranks = (((size + 1.0) ** power - 1.0) * uniform + 1.0) ** (1.0 / power)
    return (ranks.astype(np.int64) - 1).clip(0, size - 1)


def _coprime_near(size: int, share: float) -> int:
    """A number near share * size that has no divisor in common with size."""
    step = max(1, int(size * share))
    while np.gcd(step, size) != 1:
        step += 1
    return step


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-logits))


def _offset_for(scores: np.ndarray, weights: np.ndarray, rate: float) -> float:
    """The offset at which the weighted mean of the probabilities is the rate, by bisection."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        if np.average(_sigmoid(scores + middle), weights=weights) < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2
