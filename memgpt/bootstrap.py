"""Percentile bootstrap over examples, for any metric that is a function of summed per-example statistics.

`statistics` is [n, k]: row i holds what example i adds to k totals (say true positives, predicted, gold). `score` maps
totals [..., k] to the metric [...]. A resample then costs one weighted sum, whatever the metric.
"""

from collections.abc import Callable, Iterator

import numpy as np

Score = Callable[[np.ndarray], np.ndarray]

LEVEL = 95.0  # percent, two-sided
_CELLS = 2_000_000  # counts held at once: 16 MB


def interval(statistics: np.ndarray, score: Score, resamples: int, seed: int) -> tuple[float, float]:
    """The metric's 95 % interval.

    Raises:
        ValueError: without examples.
    """
    return _bounds(np.concatenate([score(counts @ statistics) for counts in _counts(len(statistics), resamples, seed)]))


def paired(a: np.ndarray, b: np.ndarray, score: Score, resamples: int, seed: int) -> tuple[float, float, float]:
    """score(a) − score(b) and its 95 % interval, both scored on the same resamples: row i of a and b is one example.

    Raises:
        ValueError: without examples, or if the two do not have the same number.
    """
    if len(a) != len(b):
        raise ValueError(f"paired bootstrap of {len(a)} and {len(b)} examples: not the same test set")
    differences = [score(counts @ a) - score(counts @ b) for counts in _counts(len(a), resamples, seed)]
    return (float(score(a.sum(axis=0)) - score(b.sum(axis=0))), *_bounds(np.concatenate(differences)))


def _counts(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n examples is drawn, [some resamples, n] at a time."""
    if n == 0:
        raise ValueError("bootstrap of no examples: the test set is empty")
    random = np.random.default_rng(seed)
    chunk = max(1, _CELLS // n)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = random.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]  # each row's draws in its own range
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _bounds(values: np.ndarray) -> tuple[float, float]:
    tail = (100.0 - LEVEL) / 2
    low, high = np.percentile(values, [tail, 100.0 - tail])
    return float(low), float(high)
