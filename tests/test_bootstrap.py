"""Intervals cover what they should, pairing pays, and a chunked draw is the same draw."""

import numpy as np
import pytest

from memgpt import bootstrap


def mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def examples(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones_like(values)], axis=1)


def test_interval_matches_the_normal_one_for_a_mean() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.2, size=400)
    low, high = bootstrap.interval(examples(values), mean, resamples=2000, seed=1)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        low, high = bootstrap.interval(examples(random.normal(0.3, 1, size=60)), mean, resamples=300, seed=seed)
        covered += low <= 0.3 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_one_seed_one_interval() -> None:
    rows = examples(np.random.default_rng(0).random(50))
    assert bootstrap.interval(rows, mean, 100, seed=3) == bootstrap.interval(rows, mean, 100, seed=3)
    assert bootstrap.interval(rows, mean, 100, seed=3) != bootstrap.interval(rows, mean, 100, seed=4)


def test_chunks_draw_every_resample_with_n_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_CELLS", 25)
    chunks = list(bootstrap._counts(10, resamples=7, seed=0))
    assert [len(chunk) for chunk in chunks] == [2, 2, 2, 1]
    assert all((chunk.sum(axis=1) == 10).all() for chunk in chunks)


def test_pairing_sees_a_small_steady_gain_that_two_intervals_hide() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.2, size=200)
    better = values + 0.01
    estimate, low, high = bootstrap.paired(examples(better), examples(values), mean, 500, seed=1)
    assert estimate == pytest.approx(0.01)
    assert 0 < low <= estimate <= high
    assert bootstrap.interval(examples(better), mean, 500, seed=1)[0] < values.mean()


def test_pairing_with_itself_is_exactly_zero() -> None:
    rows = examples(np.random.default_rng(0).random(30))
    assert bootstrap.paired(rows, rows, mean, 200, seed=1) == (0.0, 0.0, 0.0)


def test_a_ratio_metric_is_scored_on_sums_not_averaged() -> None:
    rows = np.array([[1.0, 1.0], [0.0, 9.0]])  # 1 of 10, not the mean of 1 and 0
    estimate, _, _ = bootstrap.paired(rows, np.array([[0.0, 1.0], [0.0, 9.0]]), mean, 10, seed=0)
    assert estimate == pytest.approx(0.1)


def test_no_examples_and_unequal_sets_are_refused() -> None:
    with pytest.raises(ValueError, match="test set is empty"):
        bootstrap.interval(np.zeros((0, 2)), mean, 10, seed=0)
    with pytest.raises(ValueError, match="not the same test set"):
        bootstrap.paired(np.ones((3, 2)), np.ones((4, 2)), mean, 10, seed=0)
