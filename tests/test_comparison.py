"""`memgpt compare`: two models on one test set, by versions, aliases, files and experiments."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from judged_place import Place, settle
from typer.testing import CliRunner

from memgpt import cli, comparison, registry, tracking
from memgpt.errors import UserError

MODEL = "sentiment"


@pytest.fixture
def place(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = settle(tmp_path / "root", database, monkeypatch)
    (place.root / "params.yaml").write_text("", encoding="utf-8")
    return place


def register(place: Place, **model: object) -> str:
    place.model(**model)  # type: ignore[arg-type]
    return registry.register(tracking.client(), registry.candidate(MODEL))


def test_versions_are_compared_metric_by_metric_and_answer_by_answer(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(place, errors={"negative": 0.0, "neutral": 0.4, "positive": 0.4})
    register(place, errors={"negative": 0.1, "neutral": 0.0, "positive": 0.0})
    tracking.client().set_registered_model_alias("memgpt-sentiment", "champion", "1")
    monkeypatch.setattr(cli.registry, "load_config", lambda: place.config)
    arguments = ["compare", "sentiment@champion", "models:/memgpt-sentiment/2"]
    found = json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"], catch_exceptions=False).output)
    metrics = {row["metric"]: row for row in found["metrics"]}
    for name in ("macro_f1", "accuracy", "f1_positive"):  # by summed statistics, and measured anew
        row = metrics[name]
        assert row["difference"] == pytest.approx(row["b"] - row["a"])
        assert 0 < row["low"] < row["difference"] < row["high"]
    assert metrics["macro_f1"]["n"] == 300

    wrong = round(300 * (1 - metrics["accuracy"]["a"])), round(300 * (1 - metrics["accuracy"]["b"]))
    better = [example for example in found["changed"] if example["effect"] > 0]
    worse = [example for example in found["changed"] if example["effect"] < 0]
    assert len(better) - len(worse) == wrong[0] - wrong[1]
    assert all(example["gold"] == example["b"]["label"] != example["a"]["label"] for example in better)
    assert all(example["gold"] == "negative" for example in worse)
    shown = CliRunner().invoke(cli.app, arguments, catch_exceptions=False).output
    assert f"{len(better)} for the better, {len(worse)} for the worse" in shown


def test_what_cannot_be_compared_is_told(place: Place) -> None:
    register(place, errors=0.1)
    for a, b, message in (
        ("sentiment/1", "ner/1", "ner and sentiment named"),
        ("slower", "faster", "neither named; .* --model"),
        ("sentiment/1", "sentiment@1", "are both models:/memgpt-sentiment/1"),
        ("sentiment/1", "sentiment/9", "no such version; there are 1"),
        (
            "sentiment/1",
            "slower",
            "slower: neither a version .* nor an experiment .*: failed to get .*; `dvc exp show`",
        ),
    ):
        with pytest.raises(UserError, match=message):
            comparison.compare(place.config, a, b)


def test_an_experiment_is_compared_with_the_files(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read by the package's own predictor, for which a stand-in answers what the files say."""
    (place.root / ".gitignore").write_text(".memgpt/\nmlflow.db\nmlartifacts/\ncode/\n", encoding="utf-8")
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--quiet"], check=True)
    place.model(errors=0.3)
    subprocess.run([*dvc, "add", "--quiet", "models/sentiment"], check=True)
    place.git("add", ".")
    place.git("commit", "-qm", "slower")
    place.git("branch", "slower")
    place.model(errors=0.0)

    scope: dict[str, object] = {}
    exec((place.root / "code/memgpt/predict/__init__.py").read_text(), scope)
    monkeypatch.setattr("memgpt.predict.load", scope["load"])
    found = comparison.compare(place.config, "slower", "sentiment")
    assert found.metrics[0].b == 1.0
    assert found.metrics[0].low > 0.1
    assert all(example["effect"] > 0 for example in found.changed)
    assert len(found.changed) == pytest.approx(90, abs=25)
