"""`make up` as an operator uses it: real server, worker and MLflow; approval, cancel, kill -9 of all, down."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import psutil
import pytest
from conftest import CROWN, TINY, Pipeline, clean_environment

from flows import up as services
from memgpt import housekeeping

LONG = [*TINY, "pretrain.tokens=50000000", "pretrain.checkpoint_steps=5"]
SLOW = 900.0  # seconds; of a machine that does other things too


@dataclass
class Up:
    place: Pipeline
    api: str

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.api}/{path}", data, {"Content-Type": "application/json"}, method=method)
        for _ in range(30):
            try:
                with urlopen(request, timeout=120) as answer:
                    return json.loads(answer.read() or b"null")
            except HTTPError as error:
                if error.code != 503:  # the server's database is busy, and asks to be asked again
                    raise
                time.sleep(1)
        raise AssertionError(f"{path}: busy for half a minute")

    def post(self, path: str, body: Any = None) -> Any:
        return self.ask("POST", path, body or {})

    def get(self, path: str) -> Any:
        return self.ask("GET", path)

    def run(self, deployment: str, **parameters: Any) -> str:
        found = self.get(f"deployments/name/{deployment}")
        return self.post(f"deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"]

    def state(self, run: str) -> dict[str, Any]:
        return self.get(f"flow_runs/{run}")["state"]

    def ended(self, run: str) -> dict[str, Any]:
        return self.until(lambda: self.state(run), lambda state: state["type"] in ("COMPLETED", "FAILED", "CRASHED"))

    def runs(self, flow: str) -> list[dict[str, Any]]:
        return self.post("flow_runs/filter", {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC"})

    def logs(self, run: str) -> list[dict[str, Any]]:
        return self.post("logs/filter", {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200})

    @staticmethod
    def until(ask: Callable[[], Any], well: Callable[[Any], Any], seconds: float = SLOW) -> Any:
        deadline = time.monotonic() + seconds
        while not well(found := ask()):
            assert time.monotonic() < deadline, f"still {found}"
            time.sleep(0.3)
        return found

    def processes(self) -> list[psutil.Process]:
        """That work in the checkout or below."""
        found = []
        for process in psutil.process_iter():
            try:
                if Path(process.cwd()).is_relative_to(self.place.root) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def training(self) -> list[psutil.Process]:
        found = []
        for process in self.processes():
            try:
                if "pretrain" in process.cmdline() and "dvc" not in process.cmdline():
                    found.append(process)
            except psutil.Error:
                continue
        return found


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def up(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    copied = pipeline.copy(tmp_path_factory.mktemp("up") / "checkout")
    port = free_port()
    env = {**copied.env, "MEMGPT_PREFECT_PORT": port, "MEMGPT_MLFLOW_PORT": free_port(), "PYTHONPATH": str(copied.root)}
    copied = Pipeline(copied.root, env)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    subprocess.run([*git, "commit", "--all", "--quiet", "--message", "tiny"], cwd=copied.root, check=False)
    started = copied.run(sys.executable, "-m", "flows.up", timeout=1500)
    made = Up(copied, f"http://127.0.0.1:{port}/api")
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        yield made
    finally:
        copied.run(sys.executable, "-m", "flows.up", "--down")
        for process in made.processes():
            process.kill()


def switch(up: Up, name: str, on: bool) -> bool:
    """Switch a deployment's schedule; whether it was on."""
    deployment = up.get(f"deployments/name/{name}/{name}")
    (schedule,) = deployment["schedules"]
    up.ask("PATCH", f"deployments/{deployment['id']}/schedules/{schedule['id']}", {"active": on})
    return schedule["active"]


@pytest.mark.parametrize(
    ("setting", "value", "told"),
    [
        ("MEMGPT_ALERT_DAYS", "soon", "expected a number of days"),
        ("MEMGPT_PREFECT_PORT", "http", "expected a port, a number up to 65535"),
        ("MEMGPT_PREFECT_PORT", "70000", "expected a port, a number up to 65535"),
    ],
)
def test_a_setting_that_cannot_be_is_told(
    pipeline: Pipeline, tmp_path: Path, setting: str, value: str, told: str
) -> None:
    copied = pipeline.copy(tmp_path / "checkout")
    wrong = Pipeline(copied.root, {**copied.env, "PYTHONPATH": str(copied.root), setting: value})
    done = wrong.run(sys.executable, "-m", "flows.up")
    assert (done.returncode, done.stderr) == (1, f"error: {setting}={value}: {told}\n")


def test_once_is_enough(up: Up) -> None:
    before = {path.name: path.read_text() for path in (up.place.root / ".memgpt/up").glob("*.json")}
    assert set(before) == {"prefect.json", "mlflow.json", "worker.json"}
    switch(up, "monitor", True)
    switch(up, "retrain", False)
    again = up.place.run(sys.executable, "-m", "flows.up")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("runs already") == 3
    assert switch(up, "monitor", False), "what was switched in the UI stays so"
    assert not switch(up, "retrain", True)
    assert before == {path.name: path.read_text() for path in (up.place.root / ".memgpt/up").glob("*.json")}


def test_the_deployments_make_a_form(up: Up) -> None:
    retrain = up.get("deployments/name/retrain/retrain")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=up.place.root, capture_output=True, text=True).stdout
    assert retrain["version"] == head.strip()
    assert retrain["schedules"][0]["schedule"]["cron"] == "0 3 * * 1"
    fields = retrain["parameter_openapi_schema"]["properties"]
    assert set(fields) == {"tasks", "overrides", "force", "approval", "replace"}
    assert all(field["description"] for field in fields.values())
    assert fields["approval"]["enum"] == ["auto", "manual"]
    for name in ("promote", "rollback", "score", "monitor"):
        found = up.get(f"deployments/name/{name}/{name}")
        assert found["description"]
        assert all(field.get("description") for field in found["parameter_openapi_schema"]["properties"].values())


def test_a_wrong_override_is_told_in_one_line(up: Up) -> None:
    state = up.ended(up.run("retrain/retrain", overrides=["finetune.ner.epoch=2"]))
    assert state["type"] == "FAILED"
    assert state["message"] == "overrides: finetune.ner.epoch: unknown key; did you mean 'epochs'?"


def test_held_approved_by_a_person_then_nothing_to_do(up: Up) -> None:
    order = {"overrides": TINY, "tasks": ["recommendation"]}
    state = up.ended(up.run("retrain/retrain", **order, approval="manual"))
    assert state["message"].startswith("promote@base: memgpt-base version 1 is rejected: ")  # a tiny core is no good
    for folder in (up.place.root, up.place.root / ".memgpt/workspace"):  # no checkout keeps a run's overrides
        assert subprocess.run(["git", "diff", "--quiet", "--", "params.yaml"], cwd=folder).returncode == 0
    assert subprocess.run(["git", "diff", "--quiet"], cwd=up.place.root).returncode == 0  # nobody's checkout is touched

    rejections = {"filter": {"event": {"name": ["memgpt.gate.rejected"]}}}
    told = up.until(lambda: up.post("events/filter", rejections)["events"], bool)
    assert told[0]["resource"]["prefect.resource.id"] == "memgpt.model.base"

    def waiting() -> list[dict[str, Any]]:
        return [run for run in up.runs("promote") if run["state"]["name"] == "Suspended"]

    first = up.until(waiting, lambda runs: len(runs) == 1)[0]
    assert first["parameters"]["model"] == "recommendation"
    newer = up.run("promote/promote", model="recommendation")
    up.until(lambda: up.state(first["id"]), lambda state: state["name"] == "Superseded")
    up.until(lambda: up.state(newer), lambda state: state["name"] == "Suspended")
    answer = {"decision": "approve", "name": "Ada", "comment": "looks right", "version": "1"}
    # Suspended is to be seen a moment before the form is; an answer that comes between is turned down
    up.until(
        lambda: up.post(f"flow_runs/{newer}/resume", {"run_input": answer}), lambda told: told["status"] == "ACCEPT", 60
    )
    assert up.ended(newer)["name"] == "Approved"
    history = up.place.run("memgpt", "history", "recommendation").stdout
    assert "Ada" in history
    assert "looks right" in history

    crowned = up.place.run(sys.executable, "-c", CROWN.replace("in MODELS", "in ['base']"))
    assert crowned.returncode == 0, crowned.stderr
    assert up.ended(up.run("retrain/retrain", **order))["message"] == "base unchanged, recommendation unchanged"
    assert up.ended(up.run("retrain/retrain", **order))["name"] == "Nothing to do"
    artifacts = {each["key"] for each in up.post("artifacts/latest/filter", {})}
    assert {"retrain-summary", "retrain-metrics", "retrain-mlflow", "approve-recommendation"} <= artifacts


def test_a_service_is_known_by_its_lock_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    service = services.Service("mlflow", ["http.server", "0"], clean_environment(), tmp_path, lambda: True)
    assert service.start() == "started"
    try:
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: 0.0)  # the clock was set
        assert service.start() == "runs already"
    finally:
        assert services.stop("mlflow")
    assert not services.stop("mlflow")


def test_started_twice_at_once_it_runs_once_and_who_looks_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    service = services.Service("mlflow", ["http.server", "0"], clean_environment(), tmp_path, lambda: True)
    with ThreadPoolExecutor(2) as pool:
        try:
            told = list(pool.map(lambda _: service.start(), range(2)))
            assert sorted(told) == ["runs already", "started"]
            assert housekeeping.service("mlflow")
        finally:
            assert services.stop("mlflow")
    note = housekeeping.UP / "mlflow.json"
    note.write_text(json.dumps({"pid": os.getpid()}))
    with housekeeping._unused(note, fcntl.LOCK_SH):  # as `memgpt doctor` does
        assert not housekeeping.service("mlflow")


def test_late_runs_of_the_schedule_collapse_into_one(up: Up) -> None:
    deployment = up.get("deployments/name/retrain/retrain")["id"]
    hourly = {"interval": 3600, "anchor_date": "2026-01-01T00:00:00Z"}
    wrong = {"overrides": ["finetune.ner.epoch=2"]}  # ends soon
    schedule = {"active": True, "schedule": hourly, "parameters": wrong}
    made = up.post(f"deployments/{deployment}/schedules", [schedule])
    now = datetime.now(UTC)
    missed = {"start_time": (now - timedelta(hours=4)).isoformat(), "end_time": now.isoformat()}  # the machine was off
    up.post(f"deployments/{deployment}/schedule", missed)
    try:
        stood_for = up.until(lambda: [r for r in up.runs("retrain") if r["state"]["name"] == "Cancelled"], bool)
    finally:
        up.ask("DELETE", f"deployments/{deployment}/schedules/{made[0]['id']}")
    assert " stands for it" in stood_for[0]["state"]["message"]
    up.until(lambda: [r for r in up.runs("retrain") if r["state"]["type"] in ("RUNNING", "PENDING")], lambda r: not r)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cancelled_the_training_is_gone_within_ten_seconds(up: Up) -> None:
    run = up.run("retrain/retrain", overrides=LONG, tasks=[])
    up.until(up.training, bool)
    up.post(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}, "force": False})
    up.until(up.training, lambda found: not found, 10)
    up.until(lambda: up.state(run), lambda state: state["type"] == "CANCELLED")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_everything_comes_back_and_training_resumes(up: Up) -> None:
    run = up.run("retrain/retrain", overrides=LONG, tasks=[])
    checkpoints = up.place.root / ".memgpt/workspace/.memgpt/checkpoints"
    up.until(lambda: list(checkpoints.rglob("complete")), bool)
    for process in up.processes():  # the machine loses power
        process.send_signal(signal.SIGKILL)
    up.until(up.processes, lambda found: not found, 20)
    again = up.place.run(sys.executable, "-m", "flows.up", timeout=1500)
    assert again.returncode == 0, again.stdout + again.stderr
    assert up.until(lambda: up.state(run), lambda state: state["type"] == "CRASHED")
    resumed = up.run("retrain/retrain", overrides=LONG, tasks=[])
    up.until(lambda: " ".join(log["message"] for log in up.logs(resumed)), lambda text: "resuming at step" in text)
    up.post(f"flow_runs/{resumed}/set_state", {"state": {"type": "CANCELLING"}, "force": False})
    up.until(up.training, lambda found: not found)


def test_down_stops_all_that_up_started(up: Up) -> None:
    """The last test here: there is no `up` after it."""
    stopped = up.place.run(sys.executable, "-m", "flows.up", "--down")
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("stopped") == 3
    up.until(up.processes, lambda found: not found, 20)
    assert up.place.run(sys.executable, "-m", "flows.up", "--down").stdout.count("did not run") == 3
