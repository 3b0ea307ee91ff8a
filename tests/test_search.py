"""The search over settings on the tiny pipeline: it decides by validation, prunes, and goes on after a kill."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import Pipeline

from memgpt import config, search, tracking
from memgpt.errors import UserError
from memgpt.stages import finetune

ROOT = Path(__file__).parents[1]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    for folder in ("models/base", "data/tables/ner"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "content").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def test_a_space_is_read_and_a_wrong_one_named(place: Path) -> None:
    space = search.parse_space("ner", ["learning_rate=1e-4..0.01", "batch_size=16,32", "tune=all,lora"])
    assert space == {"learning_rate": (1e-4, 0.01), "batch_size": [16, 32], "tune": ["all", "lora"]}
    assert search.parse_space("ner", search.DEFAULT_SPACE)
    nested = search.parse_space("ner", ["augment.letter_case=0..1", "dropout=0..0.3"])
    assert nested == {"augment.letter_case": (0.0, 1.0), "dropout": (0.0, 0.3)}
    apart = {"ensemble": [1, 3], "soup": [1, 2]}  # each goes with what params.yaml has, if not with the other
    assert search.parse_space("ner", ["ensemble=1,3", "soup=1,2"]) == apart
    for wrong, said in {
        "learning_rat=0.1..0.2": "did you mean 'learning_rate'",
        "batch_size=16..32": "list the values",
        "dropout=0.3..0.1": "low..high",
        "learning_rate=0.1...inf": "low..high",
        "tune=all,none": "finetune.ner.tune",
    }.items():
        with pytest.raises(UserError, match=said):
            search.parse_space("ner", [wrong])


def test_it_finds_the_peak_prunes_and_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a known score in place of a training: best at dropout 0.2, hopeless above 0.4."""

    def fit(params: Any, task: str, target: Path, log: Any = None, watch: Any = None) -> dict[str, float]:
        score = 1 - abs(params.dropout - 0.2)
        for epoch in (1, 2, 3):
            watch(score * epoch / 3, epoch)
        return {"validation_f1": score}

    monkeypatch.setattr(finetune, "fit", fit)
    space = search.parse_space("ner", ["dropout=0.0..0.9"])
    seen: list[tuple[int, float | None]] = []
    search.search("ner", space, 6, lambda number, score, *_: seen.append((number, score)))
    study = search.search("ner", space, 25, lambda number, score, *_: seen.append((number, score)))
    assert [number for number, _ in seen] == list(range(25)), "the second call went on with the first one's study"
    tried = [trial.params["dropout"] for trial in study.get_trials()]
    assert not set(tried[:6]) & set(tried[6:12]), "and did not draw the same values again"
    assert study.best_value > 0.95
    assert any(score is None for _, score in seen), "some were pruned"
    best = study.best_params["dropout"]
    assert search.as_settings("ner", study) == f"--set finetune.ner.dropout={float(f'{best:.3g}')}"
    search.draw(study, place / "tune.png")
    assert (place / "tune.png").stat().st_size > 1000
    runs = tracking.client().search_runs([tracking.experiment(tracking.STAGES)], "tags.stage = 'trial'")
    parents = tracking.client().search_runs([tracking.experiment(tracking.STAGES)], "tags.stage = 'tune'")
    assert len(runs) == 25
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {run.info.run_id for run in parents}


def test_a_trial_that_fails_does_not_end_the_study(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of values that cannot be trained with it is pruned; by a bug it fails, and the next call goes on."""
    told: list[tuple[float | None, dict[str, Any], str]] = []
    bugs = [RuntimeError("a bug")]
    trained: list[Any] = []

    def fit(params: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        if params.augment.letter_case == 2:
            trained.append(params)
            raise UserError("out of GPU memory")
        if bugs:
            raise bugs.pop()
        return {"validation_f1": 0.5}

    monkeypatch.setattr(finetune, "fit", fit)
    space = search.parse_space("ner", ["augment.letter_case=0,2", "ensemble=1,3", "soup=1,2"])
    with pytest.raises(RuntimeError, match="a bug"):
        search.search("ner", space, 12, lambda _, *rest: told.append(rest))
    study = search.search("ner", space, 12, lambda _, *rest: told.append(rest))
    states = [trial.state.name for trial in study.get_trials()]
    assert states.count("FAIL") == 1 and "RUNNING" not in states and len(states) == 13
    for score, values, why in told:
        if values.get("augment.letter_case") == 2 and 1 in (values["ensemble"], values["soup"]):
            assert (score, why) == (None, "out of GPU memory")
        elif (values.get("ensemble"), values.get("soup")) == (3, 2):
            assert score is None and "both take several seeds" in why
        else:
            assert (score, why) == (0.5, "")
    assert {why[:10] for _, _, why in told} == {"", "out of GPU", "--space: f"}
    nothing = search.parse_space("ner", ["augment.letter_case=2"])
    trained.clear()
    for _ in range(2):
        with pytest.raises(UserError, match="tune ner: no trial could be finished; the last: out of GPU memory"):
            search.search("ner", nothing, 2, lambda *_: None)
    assert len(trained) == 2 + 2, "the second call begins anew"
    runs = tracking.client().search_runs([tracking.experiment(tracking.STAGES)], "tags.stage = 'trial'", max_results=4)
    assert {run.data.tags["error"].removeprefix("UserError: ") for run in runs} == {"out of GPU memory"}


def test_rounding_stays_within_the_range() -> None:
    study = optuna.create_study()
    drawn = {"dropout": 0.99986, "learning_rate": 0.0012342, "batch_size": 16}
    study.enqueue_trial(drawn)
    trial = study.ask()
    for key, choice in {"dropout": (0.1, 0.9999), "learning_rate": (0.0012341, 1.0), "batch_size": [16]}.items():
        search._suggest(trial, key, choice)
    assert search._tried(trial) == {"dropout": 0.9999, "learning_rate": 0.0012341, "batch_size": 16}


def test_other_data_begin_another_study(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "fit", lambda *args, **kwargs: {"validation_f1": 0.5})
    space = search.parse_space("ner", ["batch_size=16,32"])
    first = search.search("ner", space, 1, lambda *told: None)
    (place / "data/tables/ner/content").write_text("y")
    assert search.search("ner", space, 1, lambda *told: None).study_name != first.study_name


def test_every_core_to_start_from_is_part_of_the_question(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "fit", lambda *args, **kwargs: {"validation_f1": 0.5})
    space = search.parse_space("ner", ["start=base,multitask"])
    with pytest.raises(UserError, match="models/multitask"):  # before any trial
        search.search("ner", space, 1, lambda *told: None)
    (place / "models/multitask").mkdir()
    names = []
    for content in "xy":
        (place / "models/multitask/content").write_text(content)
        names.append(search.search("ner", space, 1, lambda *told: None).study_name)
    assert names[0] != names[1]


def test_killed_in_a_trial_it_goes_on_with_its_values(pipeline: Pipeline, tmp_path: Path) -> None:
    """A real one, from the command line, on the tiny core."""
    place = tmp_path / "checkout"
    place.mkdir()
    for folder in ("data", "models"):
        (place / folder).symlink_to(pipeline.root / folder)
    document = config.override(config.read(ROOT / "params.yaml"), ["finetune.sentiment.epochs=2"])
    config.write(document, place / "params.yaml")
    command = [sys.executable, "-m", "memgpt.cli", "tune", "sentiment", "--trials", "2", "--space", "dropout=0.1,0.2"]
    victim = subprocess.Popen(command, cwd=place, env=pipeline.env)
    while not list(place.glob(".memgpt/checkpoints/*/epochs/scores.json")):
        assert victim.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    done = subprocess.run(command, cwd=place, env=pipeline.env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "memgpt retrain --set finetune.sentiment.dropout=0." in done.stdout
    name = optuna.get_all_study_names(f"sqlite:///{place}/.memgpt/studies/studies.db")[0]
    trials = optuna.load_study(study_name=name, storage=f"sqlite:///{place}/.memgpt/studies/studies.db").get_trials()
    assert trials[0].state.name == "FAIL"
    assert trials[1].params == trials[0].params
    assert [trial.state.name for trial in trials].count("FAIL") == 1
    assert len(trials) == 3


def test_the_range_test_ends_where_the_loss_leaves_its_valley(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pipeline.root)
    points, rate = search.range_test("sentiment", config.load().finetune.sentiment, steps=40)
    rates, losses = zip(*points, strict=True)
    assert list(rates) == sorted(rates)
    assert min(losses) < losses[0], "somewhere it learnt"
    assert rate is None or 1e-6 <= rate < rates[losses.index(min(losses))]


def test_the_steepest_fall_is_no_batch_by_chance() -> None:
    """A loss that is level, falls in the middle and rises, and one that only scatters."""
    noise = 0.2 * np.random.default_rng(0).standard_normal(100)
    level, fall = np.full(45, 2.0), np.linspace(2, 1, 10)
    falling = np.concatenate((level, fall, np.full(45, 1.0)))
    means, chance = search._smoothed(falling + noise)
    assert 40 < np.gradient(means).argmin() < 60
    assert means[:50].max() - means.min() > chance
    means, chance = search._smoothed(2 + noise)
    assert abs(means - 2).max() < 2 * chance
