"""The server alerts, whatever became of the run: a real one, a local webhook, and processes that are killed."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import servers
from conftest import ROOT
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Suspended

from flows import alerts

pytestmark = pytest.mark.timeout(900)

HEAD = """
import time
from prefect import flow
from prefect.events import emit_event
from prefect.states import Completed
"""
FAIL = """
@flow(flow_run_name="tidy")
def retrain(): raise ValueError('said "no"')
try: retrain()
except ValueError: pass
"""
HANG = """
@flow(flow_run_name="lost")
def retrain():
    time.sleep(3)  # the first heartbeat is on its way
    print("running", flush=True)
    time.sleep(100)
retrain()
"""
TWICE = """
for _ in range(2):
    emit_event("memgpt.gate.rejected", {"prefect.resource.id": "memgpt.model.ner"},
               payload={"summary": "ner 7 is rejected", "version": "7", "reasons": "unseen fell; f1 fell"})
emit_event("memgpt.monitor.surge", {"prefect.resource.id": "memgpt.topic.orders"}, payload={"summary": "orders: 40 %"})
"""
IN_A_FLOW = """
@flow
def score():
    emit_event("memgpt.monitor.drift", {"prefect.resource.id": "memgpt.source.sentiment"}, payload={"summary": "away"})
    return Completed(name="Drift")
score()
"""


@dataclass
class Place:
    """A server, a webhook, and the texts that came to it."""

    webhook: str = ""
    env: dict[str, str] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)

    def start(self, script: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HEAD + script]
        return subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=subprocess.PIPE, text=True)

    def run(self, script: str) -> None:
        assert self.start(script).wait(60) == 0

    def about(self, *words: str) -> list[str]:
        return [text for text in self.told if all(word in text for word in words)]


def until(found: Callable[[], Any], seconds: float = 180) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.3)
    return answer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A fresh server with the alerts set up, windows of 12 seconds instead of minutes and days."""
    made = Place()

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            made.told.append(json.loads(self.rfile.read(int(self.headers["content-length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    webhook = ThreadingHTTPServer(("127.0.0.1", 0), Webhook)
    threading.Thread(target=webhook.serve_forever, daemon=True).start()
    made.webhook = f"http://127.0.0.1:{webhook.server_port}"
    home = tmp_path_factory.mktemp("home")
    with servers.prefect(home, PREFECT_SERVER_SERVICES_PAUSE_EXPIRATIONS_LOOP_SECONDS="1") as env:
        made.env = env
        with pytest.MonkeyPatch.context() as patch, temporary_settings({PREFECT_API_URL: env["PREFECT_API_URL"]}):
            patch.setattr(alerts, "MISSED", 12 / 30)
            patch.delenv(alerts.WEBHOOK, raising=False)
            yield made
    webhook.shutdown()


def automations() -> dict[str, Any]:
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/automations/filter", json={}).json()
    assert len({each["name"] for each in found}) == len(found)
    return {each["name"]: each for each in found}


def test_without_a_webhook_nothing_alerts(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    alerts.ensure(8)
    assert not [name for name in automations() if "alert" in name]
    assert "set MEMGPT_ALERT_WEBHOOK" in capsys.readouterr().out


def test_what_is_there_stays_as_it_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(alerts.WEBHOOK, place.webhook)
    alerts.ensure(8)
    before = automations()
    assert len([name for name in before if "alert" in name]) == 6
    monkeypatch.delenv(alerts.WEBHOOK)
    alerts.ensure(8)  # the block remembers the URL: later tests hear of it
    assert automations() == before
    with get_client(sync_client=True) as client:
        client.pause_automation(before["memgpt alert: overdue"]["id"])
    alerts.ensure(12 / 86400)
    after = automations()
    changed = {name for name in after if after[name]["trigger"] != before[name]["trigger"]}
    assert changed == {"memgpt alert: overdue"}
    assert not after["memgpt alert: overdue"]["enabled"]  # as somebody wanted it


def test_failed_crashed_and_unanswered_runs(place: Place) -> None:
    hanging = place.start(HANG)
    assert hanging.stdout is not None
    assert hanging.stdout.readline() == "running\n"
    hanging.kill()  # no worker, nobody to tell
    hanging.wait()
    with get_client(sync_client=True) as client:
        promote = client.create_flow_from_name("promote")
        answer = client.request("POST", "/flow_runs/", json={"flow_id": str(promote), "name": "unanswered"})
        waiting = answer.json()["id"]
        client.set_flow_run_state(waiting, Suspended(timeout_seconds=1), force=True)
        place.run(FAIL)
        (failed,) = until(lambda: place.about("retrain / tidy: Failed"))
        assert 'said "no"' in failed
        assert f"{place.env['PREFECT_API_URL'].removesuffix('/api')}/runs/flow-run/" in failed
        until(lambda: client.read_flow_run(waiting).state_name == "Held")
        assert client.read_flow_run(waiting).state.is_completed()
    (crashed,) = until(lambda: place.about("retrain / lost: Crashed"))
    assert "No heartbeat for 12 seconds" in crashed
    assert len(place.about("retrain / tidy")) == 1
    assert not place.about("unanswered")


def test_events_are_told_once_each(place: Place) -> None:
    place.run(TWICE)
    until(lambda: place.about("orders: 40 %"))
    place.run(IN_A_FLOW)
    (drift,) = until(lambda: place.about("away"))
    assert "/runs/flow-run/" in drift
    assert place.about("rejected") == ["ner 7 is rejected: unseen fell; f1 fell"]


def test_no_success_for_long(place: Place) -> None:
    assert not place.about("no run has succeeded")  # was disabled
    with get_client(sync_client=True) as client:
        client.resume_automation(automations()["memgpt alert: overdue"]["id"])
    until(lambda: place.about("no run has succeeded"))
    assert [text.split(":")[0] for text in place.about(": Crashed")] == ["retrain / lost"], (
        "others ended and fell silent"
    )
