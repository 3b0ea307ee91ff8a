"""The flow: order, retries, a stage's own message, and what is left when it is killed."""

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Pipeline
from prefect.exceptions import ParameterTypeError
from ruamel.yaml import YAML

from flows import crew as crews
from flows import retrain
from flows.crew import Crew, Order, Progress, Queue, Step, _outcome, _reason, steps
from memgpt import config, console
from memgpt.errors import UserError


def crew(
    monkeypatch: pytest.MonkeyPatch, outputs: list[tuple[int, list[str]]], cores: int = 2
) -> tuple[Crew, list[Any]]:
    """A crew whose children end at once, each with the next of `outputs`, and what they were asked to run."""
    monkeypatch.setattr(crews.time, "sleep", lambda _: None)
    made, asked = Crew(console.Board(), cores, Order(replace=("ner",))), []

    def run(command: list[str], env: dict[str, str], on_line: Any) -> int:
        asked.append((command, env))
        status, lines = outputs.pop(0)
        for line in lines:
            on_line(line)
        return status

    monkeypatch.setattr(made.children, "run", run)
    monkeypatch.setattr(crews, "get_run_logger", lambda: __import__("logging").getLogger("test"))
    return made, asked


def test_a_finetune_waits_for_what_it_starts_from() -> None:
    document = config.read(Path(__file__).parents[2] / "params.yaml")
    config.override(document, ["finetune.ner.start=multitask", "finetune.sentiment.start=base"])
    after = {step.name: step.after for step in steps(config.parse(document))}
    assert after["finetune@ner"] == ("multitask",)
    assert after["finetune@sentiment"] == ("pretrain",)
    assert after["promote@ner"] == ("evaluate@ner",)


def test_of_those_that_wait_the_lowest_rank_goes_first() -> None:
    queue, went = Queue(places=1), []

    def go(rank: int) -> None:
        with queue.place(rank):
            went.append(rank)

    threads = [threading.Thread(target=go, args=(rank,)) for rank in (9, 2, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert went == [0, 1, 2, 9]


def test_another_dvc_at_work_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = (255, ["ERROR: 'models/ner' is busy, it is being blocked by:"])
    starting = (255, ["ERROR: Unable to acquire lock. Most likely another DVC process is running or was terminated"])
    made, asked = crew(monkeypatch, [busy, starting, (0, ["Running stage 'finetune@ner':"])])
    assert made.run(Step("finetune@ner")).is_completed()
    assert len(asked) == 3


def test_a_registry_that_comes_back_is_waited_for_and_one_that_does_not_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retrain.time, "sleep", lambda _: None)
    answers = iter([UserError("no MLflow server answers"), UserError("no MLflow server answers"), None])

    def use() -> None:
        if error := next(answers, UserError("gone for good")):
            raise error

    monkeypatch.setattr(retrain.tracking, "use", use)
    retrain._reach_registry(console.Board())
    with pytest.raises(UserError, match="gone for good"):
        retrain._reach_registry(console.Board())


def test_training_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[float, str]] = []

    def create(share: float, key: str, description: str) -> str:
        assert key == "progress-finetune-ner"
        shown.append((share, description))
        return "artifact"

    def update(artifact: str, share: float, description: str) -> None:
        shown.append((share, description))

    monkeypatch.setattr(crews, "create_progress_artifact", create)
    monkeypatch.setattr(crews, "update_progress_artifact", update)
    progress = Progress("finetune@ner", tokens=1000)
    for line in (
        "Running stage",
        "ner: step 1/40, 40 s left",
        "ner: step 10/40, loss 2.500, 15 s left",
        "ner: step 40/40, loss 1.500, 0 s left",
    ):
        progress.hear(line)
    assert shown == [
        (2.5, "step 1 of 40, 975 tokens/s, 40 s left"),
        (25.0, "step 10 of 40, loss 2.500, 2,000 tokens/s, 15 s left"),
        (100.0, "step 40 of 40, loss 1.500, 0 s left"),
    ]


def test_a_server_that_is_away_costs_a_training_its_picture_only(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def create(*_: Any, **__: Any) -> str:
        asked.append(1)
        raise ConnectionError("nobody there")

    monkeypatch.setattr(crews, "create_progress_artifact", create)
    lines = [f"ner: step {step}/40, loss 2.500, 15 s left" for step in (10, 20, 30)]
    made, _ = crew(monkeypatch, [(0, lines)])
    assert made.run(Step("finetune@ner")).is_completed()
    assert asked == [1], "and it is not asked at each line"


def test_the_form_takes_every_key_of_params_as_an_override() -> None:
    def keys(section: dict[str, Any], above: str = "") -> list[str]:
        return [
            key
            for name, value in section.items()
            for key in (keys(value, f"{above}{name}.") if isinstance(value, dict) else [f"{above}{name}"])
        ]

    assignments = [f"{key}=1" for key in keys(config.load(ROOT / "params.yaml").model_dump(by_alias=True))]
    assert "pretrain.float8=1" in assignments
    retrain.retrain.validate_parameters({"overrides": [*assignments, "promote.ner.slices.top-10=0.1"]})
    for wrong in ("epochs=2", "finetune.ner.epochs"):
        with pytest.raises(ParameterTypeError, match="String should match pattern"):
            retrain.retrain.validate_parameters({"overrides": [wrong]})


def test_a_step_that_cannot_even_start_fails_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = crew(monkeypatch, [])

    def run(*_: Any) -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(made.children, "run", run)
    assert retrain.run_step.fn(Step("promote@ner"), made).is_failed()
    assert made.failures == ["promote@ner: OSError: [Errno 12] Cannot allocate memory"]


def test_a_failure_speaks_in_the_stages_words(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "error: src/x.csv: missing; fetch it",
        "ERROR: failed to reproduce 'ingest@ner': failed to run: memgpt ingest",
    ]
    made, _ = crew(monkeypatch, [(255, lines)])
    state = made.run(Step("ingest@ner"))
    assert state.is_failed()
    assert state.message == "ingest@ner: src/x.csv: missing; fetch it"
    assert made.failures == [state.message]


def test_the_cores_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    made, asked = crew(monkeypatch, [(0, [])] * 2, cores=8)
    made.run(Step("pretrain", alone=True))
    made.run(Step("finetune@ner"))
    assert [env["MEMGPT_THREADS"] for _, env in asked] == ["8", "2"]


def test_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = crew(monkeypatch, [(0, [])] * 4)
    for name in ("snapshot", "evaluate@ner", "promote@ner", "promote@base"):
        made.run(Step(name))
    assert [command[2:] for command, _ in asked] == [
        ["memgpt.cli", "snapshot"],
        ["dvc", "repro", "--single-item", "evaluate@ner"],
        ["memgpt.cli", "promote", "ner", "--replace"],
        ["memgpt.cli", "promote", "base"],
    ]


def test_what_dvc_did_is_told() -> None:
    assert _outcome(["Stage 'pretrain' didn't change, skipping"]) == "skipped (unchanged)"
    assert _outcome(["Stage 'pretrain' is cached - skipping run, checking out outputs"]) == "restored from the cache"
    assert _outcome(["Running stage 'pretrain':"]) == "done"


def test_a_reason_is_the_last_error() -> None:
    assert _reason(["error: first", "error: last", "more"]) == "last"
    assert _reason(["ERROR: unexpected error - [Errno 28]"]) == "unexpected error - [Errno 28]"
    assert _reason(["Traceback", "KeyError: 'x'", "ERROR: failed to reproduce 'p': failed to run: memgpt p"]) is None


# --- with a pipeline that has run ------------------------------------------------


def processes_in(root: Path) -> list[str]:
    """Command lines of the processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve().is_relative_to(root):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (OSError, ValueError):
            continue
    return [line for line in found if line]


def test_the_first_run_shows_every_stage_and_a_verdict_each(pipeline: Pipeline) -> None:
    done = [line.split()[0] for line in pipeline.first.splitlines() if line.startswith("  ") and line.endswith(" s")]
    assert {step.name for step in steps(config.load(pipeline.root / "params.yaml"))} <= set(done)
    for model in config.MODELS:
        assert any(line.startswith(f"{model} ") for line in pipeline.first.splitlines())
    assert "Traceback" not in pipeline.first


def test_the_server_keeps_tasks_logs_and_artifacts(pipeline: Pipeline) -> None:
    import sqlite3

    with sqlite3.connect(pipeline.root / ".prefect" / "prefect.db") as database:
        tasks = {name for (name,) in database.execute("select name from task_run")}
        artifacts = {key for (key,) in database.execute("select key from artifact")}
        logs = " ".join(message for (message,) in database.execute("select message from log"))
    assert {step.name for step in steps(config.load(pipeline.root / "params.yaml"))} <= tasks
    assert {"retrain-metrics", "retrain-summary", "memgpt-ner", "retrain-mlflow"} <= artifacts
    assert "finetune ner: done in" in logs


def test_dvc_finds_nothing_to_do_after_the_flow(pipeline: Pipeline) -> None:
    done = pipeline.run("dvc", "status")
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stdout


def test_a_failing_stage_ends_the_flow_in_its_own_words(pipeline: Pipeline, tmp_path: Path) -> None:
    broken = pipeline.copy(tmp_path / "checkout")
    done = broken.run("memgpt", "retrain", "--set", "validate.min_rows=1000000")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors
    assert all(line.startswith("error: validate@") for line in errors)
    assert "Traceback" not in done.stdout + done.stderr
    for later in ("tokenize", "pretrain", "promote"):
        assert f"  {later}" not in done.stdout
    assert not (broken.root / ".memgpt" / "verdicts").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_flow_leaves_no_process_and_the_next_run_ends_as_if_undisturbed(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    place = pipeline.copy(tmp_path / "checkout")
    command = ["memgpt", "retrain", "--set", "pretrain.tokens=50000000"]
    flow = subprocess.Popen(
        command, cwd=place.root, env=place.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 600
        while not any("memgpt pretrain" in line for line in processes_in(place.root)):
            assert flow.poll() is None, "the flow ended by itself"
            assert time.monotonic() < deadline, "pretraining did not start"
            time.sleep(0.2)
        second = place.run("memgpt", "retrain")
        assert second.returncode == 1
        assert f"retrain already runs here (process {flow.pid})" in second.stderr
        settings = (place.root / "params.yaml").read_text(encoding="utf-8")
        third = place.run("memgpt", "retrain", "--set", "finetune.ner.epochs=9")
        assert third.returncode == 1 and f"(process {flow.pid}) works here" in third.stderr
        assert (place.root / "params.yaml").read_text(encoding="utf-8") == settings, "the run goes on by them"
        flow.kill()  # SIGTERM and deeper nesting: tests/test_processes.py
        flow.wait(60)
    finally:
        flow.kill()
    deadline = time.monotonic() + 60
    while processes_in(place.root) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_in(place.root) == []

    # With no base model to restore, `dvc repro` writes the lock that the undisturbed run wrote.
    shutil.copy(pipeline.root / "params.yaml", place.root)
    lock = YAML(typ="safe").load(pipeline.root / "dvc.lock")
    base = lock["stages"]["pretrain"]["outs"][0]["md5"]
    cache = place.root / ".dvc" / "cache"
    (cache / "files" / "md5" / base[:2] / base[2:]).unlink()
    shutil.rmtree(cache / "runs")
    done = place.run("dvc", "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Running stage 'pretrain'" in done.stdout
    assert (place.root / "dvc.lock").read_text() == (pipeline.root / "dvc.lock").read_text()
