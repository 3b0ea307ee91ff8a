"""The flows that score and monitor: what they leave in Prefect, on a server of the tests' own."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from judged_place import gold
from prefect.client.orchestration import get_client
from prefect.testing.utilities import prefect_test_harness

import flows.monitor
from flows.monitor import monitor
from flows.score import score
from memgpt import config, monitoring, registry, scoring, tracking

ROOT = Path(__file__).parents[2]
DAYS = 20


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry with one version, which answers `gold`; registry and version have tests of their own."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)

    def answer(rows: list[scoring.Row]) -> list[dict[str, Any]]:
        labels = [gold(row["text"]) for row in rows]
        return [{"label": label, "scores": {label: 1.0}, "topic": None} for label in labels]

    monkeypatch.setattr(tracking, "use", lambda: None)
    monkeypatch.setattr(tracking, "client", lambda: None)
    monkeypatch.setattr(registry, "resolve", lambda client, reference: ("sentiment", "1"))
    monkeypatch.setattr(registry, "version_tags", lambda *_: {"labels": '["negative", "neutral", "positive"]'})
    monkeypatch.setattr(scoring, "asking", lambda *_: nullcontext(answer))


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path("arriving").mkdir(exist_ok=True)
    (Path("arriving") / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def day(number: int, negative: int, others: int) -> list[dict[str, Any]]:
    when = date(2024, 6, 3) + timedelta(number)
    texts = [f"text {n} of {when}" for n in range(200)]
    chosen = [text for text in texts if gold(text) == "negative"][:negative]
    chosen += [text for text in texts if gold(text) != "negative"][:others]
    return [{"text": text, "topic": "energy", "time": str(when)} for text in chosen]


def events(name: str) -> list[dict[str, Any]]:
    """The events of a name, once they have come."""
    wanted = {"filter": {"event": {"name": [name]}}, "limit": 50}
    deadline = time.monotonic() + 120
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            found = client.request("POST", "/events/filter", json=wanted).json()["events"]
            if found:
                return found
            time.sleep(0.3)
    return []


def artifacts(key: str) -> list[Any]:
    with get_client(sync_client=True) as client:
        return client.request("POST", "/artifacts/filter", json={"artifacts": {"key": {"any_": [key]}}}).json()


def test_score_shows_its_progress_and_says_what_it_did() -> None:
    write("a.jsonl", day(0, 3, 3))
    state = score("sentiment", "arriving", "out", chunk=4, return_state=True)
    assert state.is_completed()
    assert state.message == "6 rows in out by models:/memgpt-sentiment/1, 2 parts"
    assert sorted(path.name for path in Path("out").glob("part*")) == ["part-00000.parquet", "part-00001.parquet"]
    [bar] = artifacts("score-progress")
    assert bar["data"] == 100.0
    again = score("sentiment", "arriving", "out", chunk=4, return_state=True)
    assert again.message.endswith("2 parts, 2 of them there already")


def test_a_mistake_is_the_message_of_the_failure() -> None:
    state = score("sentiment", "nowhere", "out", return_state=True)
    assert state.is_failed()
    assert state.message == "input: nowhere: no such file or folder"
    state = monitor(return_state=True)
    assert state.is_failed()
    assert state.message.startswith("monitor.uri: null; set it to")


def test_a_surge_is_an_event_a_page_and_a_retraining_that_a_person_approves() -> None:
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow_from_name("retrain"), name="retrain")
    config.write(config.override(config.read(), ["monitor.retrain=true", "monitor.uri=arriving"]))

    def started() -> list[dict[str, Any]]:
        asked = {"deployments": {"id": {"any_": [str(deployment)]}}}
        with get_client(sync_client=True) as client:
            return client.request("POST", "/flow_runs/filter", json=asked).json()

    write("past.jsonl", [row for number in range(DAYS) for row in day(number, 1 + number % 3, 8)])
    state = monitor(return_state=True)
    assert (state.name, state.message) == ("Completed", "199 new texts; nothing unusual")
    assert started() == []

    write("today.jsonl", day(DAYS, 20, 4))
    state = monitor(return_state=True)
    assert state.is_completed() and state.name == "Surge"
    assert "energy: 20 of 24 texts negative on 2024-06-23" in state.message
    assert "started retrain/retrain" in state.message
    [told] = events("memgpt.monitor.surge")
    assert told["resource"]["prefect.resource.id"] == "memgpt.topic.energy"
    assert told["payload"]["summary"].startswith("energy: 20 of 24 texts negative")
    assert told["payload"]["surges"][0]["negative"] == 20
    page = max(artifacts("monitor"), key=lambda one: one["created"])["data"]
    assert "| energy | 24 | 20 |" in page
    assert "data:image/png;base64,iVBOR" in page
    [run] = started()
    assert run["parameters"] == {"approval": "manual"}

    write("more.jsonl", day(DAYS + 1, 20, 4))  # the surge lasts; the cool-down too
    state = monitor(return_state=True)
    assert state.name == "Surge" and "started" not in state.message
    assert len(started()) == 1
    assert monitor(return_state=True).message == "0 new texts; nothing unusual"


def test_drift_is_one_event_whatever_drifts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [monitoring.Drift("length", 0.5, 0.2, 300), monitoring.Drift("label", 0.3, 0.2, 300)]
    monkeypatch.setattr(monitoring, "drifts", lambda *_: found)
    monkeypatch.setattr(flows.monitor, "RETRAIN", "retrain/nowhere")
    config.write(config.override(config.read(), ["monitor.retrain=true", "monitor.uri=arriving"]))
    write("a.jsonl", day(0, 2, 2))
    state = monitor(return_state=True)
    assert state.is_completed() and state.name == "Drift"
    assert state.message.endswith("no retraining: retrain/nowhere is not deployed")
    [told] = events("memgpt.monitor.drift")
    assert told["resource"]["prefect.resource.id"] == "memgpt.data.sentiment"
    assert [one["what"] for one in told["payload"]["drifts"]] == ["length", "label"]
    assert told["payload"]["summary"].startswith("length drifts: stability index 0.500 over 300 texts")
    state = monitor(return_state=True)
    assert (state.name, state.message.partition(";")[0]) == ("Completed", "0 new texts")
