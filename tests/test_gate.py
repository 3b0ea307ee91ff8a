"""Each rule of the gate at its edges, on statistics alone; and what a version's process may do wrong."""

import os
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from memgpt import gate
from memgpt.config import Gate
from memgpt.errors import UserError
from memgpt.gate import Decision


def accuracy(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def answers(right: float, n: int = 400, start: int = 0) -> np.ndarray:
    """n examples, the share `right` of them right, beginning at `start`."""
    correct = np.zeros(n)
    correct[(np.arange(round(right * n)) + start) % n] = 1
    return np.stack([correct, np.ones(n)], axis=1)


def decide(challenger: np.ndarray, champion: np.ndarray | None, **changes: Any) -> Decision:
    rules = Gate(floor=changes.pop("floor", 0.2), margin=changes.pop("margin", 0.01), slices=changes.pop("named", {}))
    baseline = changes.pop("baseline", None)
    return gate.decide(
        rules, accuracy, challenger, champion=champion, baseline=baseline, resamples=500, seed=1, **changes
    )


def test_first_champion_must_pass_the_floor_and_beat_the_baseline() -> None:
    assert decide(answers(0.8), None, baseline=answers(0.5)).verdict == "promote"
    below = decide(answers(0.8), None, baseline=answers(0.5), floor=0.81)
    assert (below.verdict, below.reasons) == ("reject", ["0.8000 is below the floor 0.81"])
    assert decide(answers(0.8), None, baseline=answers(0.5), floor=0.8).verdict == "promote"


def test_better_than_the_baseline_by_chance_is_not_better() -> None:
    """+0.5 points with as many examples lost as (almost) won: the interval includes zero."""
    decision = decide(answers(0.505), None, baseline=answers(0.5, start=200))
    assert decision.numbers["over_baseline"] == pytest.approx(0.005)
    assert decision.numbers["over_baseline_low"] < 0
    assert decision.verdict == "reject"
    assert decide(answers(0.5), None, baseline=answers(0.5)).verdict == "reject"


def test_a_floor_of_a_negative_metric() -> None:
    """`base` is judged by minus bits per byte."""
    rows = np.stack([np.full(50, -3.0), np.ones(50)], axis=1)
    worse = np.stack([np.full(50, -5.0), np.ones(50)], axis=1)
    assert decide(rows, None, baseline=worse, floor=-8.0).verdict == "promote"
    assert decide(rows, None, baseline=worse, floor=-2.5).verdict == "reject"


def test_a_sure_gain_is_promoted_and_a_regression_is_held_out() -> None:
    assert decide(answers(0.8), answers(0.7)).verdict == "promote"
    held = decide(answers(0.7), answers(0.8))
    assert held.verdict == "hold"
    assert "worse than the champion" in held.reasons[0]


def test_the_margin_bounds_how_bad_an_equal_model_may_be() -> None:
    """Same score, other mistakes: the lower bound is about −4 points."""
    challenger, champion = answers(0.8, start=20), answers(0.8)
    low = decide(challenger, champion).numbers["difference_low"]
    assert -0.1 < low < 0
    assert decide(challenger, champion, margin=-low + 1e-9).verdict == "promote"
    assert decide(challenger, champion, margin=-low).verdict == "hold"  # the bound must lie above −margin
    assert decide(challenger, champion, margin=0.0).verdict == "hold"


def test_a_negative_estimate_is_not_promoted_whatever_the_margin() -> None:
    assert decide(answers(0.7975), answers(0.8), margin=0.5).verdict == "hold"
    assert decide(answers(0.8), answers(0.8), margin=0.5).verdict == "promote"


def test_margin_zero_demands_superiority() -> None:
    assert decide(answers(0.8), answers(0.8), margin=0.0).verdict == "hold"
    assert decide(answers(0.83), answers(0.8), margin=0.0).verdict == "promote"


def test_a_named_slice_may_not_pay_for_the_whole() -> None:
    """Ten points better in all, and 0.1 worse on the slice."""
    champion, challenger = answers(0.6), answers(0.7)
    rare = np.zeros(400, dtype=bool)
    rare[:40] = True
    challenger[:4, 0] = 0
    assert decide(challenger, champion, slices={"rare": rare}).verdict == "promote"
    rejected = decide(challenger, champion, slices={"rare": rare}, named={"rare": 0.05})
    assert rejected.verdict == "reject"
    assert rejected.reasons == ["slice rare (40 rows) drops by 0.1000, 0.05 is accepted"]
    assert decide(challenger, champion, slices={"rare": rare}, named={"rare": 0.11}).verdict == "promote"
    assert decide(challenger, champion, slices={"rare": rare}, named={"rare": 0.05}, replace=True).verdict == "reject"


def test_an_empty_slice_says_nothing() -> None:
    nobody = {"rare": np.zeros(400, dtype=bool)}
    assert decide(answers(0.8), answers(0.7), slices=nobody, named={"rare": 0.0}).verdict == "promote"


def test_an_unknown_slice_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"promote\.ner\.slices\.unsen: no such slice.*known: unseen"):
        gate.check_slices("ner", Gate(floor=0.0, margin=0.0, slices={"unsen": 0.1}), {"unseen": np.zeros(1)})


def test_not_comparable_is_held_until_somebody_replaces() -> None:
    why = {"incomparable": "other label set"}
    held = decide(answers(0.9), None, baseline=answers(0.5), **why)
    assert (held.verdict, held.reasons) == ("hold", ["not comparable: other label set"])
    assert decide(answers(0.9), None, baseline=answers(0.5), replace=True, **why).verdict == "promote"
    assert decide(answers(0.5), None, baseline=answers(0.5), replace=True, **why).verdict == "reject"
    assert decide(answers(0.1), None, baseline=answers(0.0), **why).verdict == "reject"  # the floor comes first


def test_replace_releases_a_hold_but_no_rejection() -> None:
    assert decide(answers(0.7), answers(0.8), replace=True).verdict == "promote"
    assert decide(answers(0.1), answers(0.8), replace=True).verdict == "reject"


def test_predictions_without_a_number_are_rejected() -> None:
    broken = answers(0.9)
    broken[3, 0] = np.nan
    assert decide(broken, answers(0.5)).verdict == "reject"


def test_words_travel_as_one_text_with_the_same_offsets() -> None:
    inputs, params = gate.as_served([["Ada", "Brandt"], ["a b", "c"]])
    assert params is not None
    assert [text.split(params["separator"]) for text in inputs] == [["Ada", "Brandt"], ["a b", "c"]]
    assert [len(text) for text in inputs] == [len("Ada Brandt"), len("a b c")]
    assert gate.as_served(["plain"]) == (["plain"], None)


def test_a_process_that_cannot_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'none.db'}")
    with gate.Version("file:///no/such/model", tmp_path, threads=1) as version:
        version.ask(["text"])
        with pytest.raises(gate.VersionError, match="file:///no/such/model does not load"):
            version.answer()
    assert version.process.returncode is not None


def test_two_that_ask_one_version_do_not_read_each_others_texts(tmp_path: Path) -> None:
    with (
        gate.Version("models:/m/3", tmp_path, threads=1) as one,
        gate.Version("models:/m/3", tmp_path, threads=1) as two,
    ):
        one.ask(["ours"])
        two.ask(["theirs"])
        assert "ours" in one.inputs.read_text() and one.inputs.parent.stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["v3.log"]


def test_a_process_that_does_not_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_files() -> list[str]:
        return os.listdir("/dev/fd")  # noqa: PTH208 as they are numbered

    (tmp_path / "system").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    monkeypatch.setattr(gate.subprocess, "Popen", Mock(side_effect=OSError("no more processes")))
    before = open_files()
    with pytest.raises(OSError, match="no more processes"):
        gate.Version("models:/m/3", tmp_path, threads=1)
    assert open_files() == before and not list((tmp_path / "system").iterdir())


def test_a_process_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with gate.Version("file:///loads/for/ever", tmp_path, threads=1, timeout=0.1) as version:
        version.ask(["text"])
        with pytest.raises(
            gate.VersionError, match=r"does not load: no answer within 0\.1 s, which is promote\.timeout_seconds"
        ):
            version.answer()
        assert version.process.wait() < 0
