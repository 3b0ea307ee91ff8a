"""What `make up` and `make down` do: a Prefect server, a worker, the MLflow UI and the deployments of prefect.yaml.

    python -m flows.up           start what is not running, deploy the checked-out commit, print the addresses
    python -m flows.up --down    stop what this started, and nothing else

All listen on loopback. State is in .prefect, mlflow.db and mlartifacts/ of the checkout; logs and process ids are in
.memgpt/up. If PREFECT_API_URL or an MLflow server in MLFLOW_TRACKING_URI is set, that server is used instead. Ports:
MEMGPT_PREFECT_PORT and MEMGPT_MLFLOW_PORT. Alerts: MEMGPT_ALERT_WEBHOOK; MEMGPT_ALERT_DAYS (8) is the number of days
without a successful retrain after which to alert.
"""

import argparse
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from uuid import UUID

import psutil
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import alerts, server, workspace
from memgpt import atomic, environment, tracking
from memgpt.console import Board
from memgpt.errors import UserError
from memgpt.housekeeping import UP, service
from memgpt.registry import commit_at_start

POOL = "memgpt"
PATIENCE = 180.0  # seconds until a service must answer; the first start creates the databases
LOOK = 5.0  # seconds to wait for the lock of a service's note
GRACE = 20.0  # seconds from SIGTERM to SIGKILL


@dataclass(frozen=True)
class Service:
    """A process that keeps running after this one.

    command: a module and its arguments; answers: whether it is ready; port: its port and the variable that sets it.
    """

    name: str
    command: list[str]
    env: dict[str, str]
    folder: Path
    answers: Callable[[], bool]
    port: tuple[str, str] | None = None

    @property
    def log(self) -> Path:
        return UP / f"{self.name}.log"

    def start(self) -> str:
        """Start the service unless it is running; returns what was done.

        Raises:
            UserError: if its port is taken.
        """
        if service(self.name):
            return "runs already"
        if self.port:
            _free(self.name, *self.port)
        UP.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log, (UP / f"{self.name}.json").open("a", encoding="utf-8") as note:
            if not self._take(note):
                return "runs already"
            note.truncate(0)
            process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=[note.fileno()],
            )
            json.dump({"pid": process.pid}, note)
        return "started"

    def _take(self, note: IO[str]) -> bool:
        """Lock the note; the process then inherits the lock and keeps it (see `service`). False if the service is
        running or another `make up` is starting it. `service` and `memgpt doctor` lock the note only for a moment."""
        deadline = time.monotonic() + LOOK
        while True:
            try:
                fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if service(self.name) or time.monotonic() > deadline:
                    return False
            time.sleep(0.05)

    def wait(self) -> None:
        """Wait until the service answers; UserError if it ends or does not answer in time."""
        deadline = time.monotonic() + PATIENCE
        while not self.answers():
            if not service(self.name) or time.monotonic() > deadline:
                stop(self.name)
                raise UserError(f"{self.name}: did not start; see {self.log}")
            time.sleep(0.2)


def stop(name: str) -> bool:
    """End a service and all its child processes; True if it was running."""
    process = service(name)
    if process:
        tree = [process, *process.children(recursive=True)]
        for each in reversed(tree):  # runs before the worker, which would restart them
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(tree, GRACE)
        for each in left:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(left, GRACE)
    (UP / f"{name}.json").unlink(missing_ok=True)
    return process is not None


def up() -> None:
    days = _number("MEMGPT_ALERT_DAYS", "8")
    if configured := os.environ.get("PREFECT_API_URL"):
        server.reach(configured)
    root = Path.cwd()
    commit, dirty = commit_at_start(root)
    tracking.use(root)
    board = Board()
    if dirty:
        board.say("note: uncommitted changes are not deployed")
    place = workspace.create(root, commit)
    crashed = ""
    with suppress(UserError), workspace.occupied(None, place) as last:  # else a run is using it; the next one resets it
        workspace.reset(place, commit)
        crashed = last

    port, ui_port = os.environ.get("MEMGPT_PREFECT_PORT", "4200"), os.environ.get("MEMGPT_MLFLOW_PORT", "5000")
    url = os.environ.get("PREFECT_API_URL") or f"http://127.0.0.1:{port}/api"
    store = os.environ["MLFLOW_TRACKING_URI"]
    ui = store if store.startswith("http") else f"http://127.0.0.1:{ui_port}"
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "PREFECT_HOME": str(root / ".prefect"),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_API_PORT": port,  # the UI reads the API's port from here, not from --port
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # as in prefect.toml, which a run, started elsewhere, does not read
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the server has the runs' logs
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "MLFLOW_BACKEND_STORE_URI": store,  # not an argument, which every user of the machine could read
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # saves seven idle processes of an unused feature
        "MEMGPT_MLFLOW_UI": ui,
        "MEMGPT_WORKSPACE": str(place),
        "MEMGPT_DEPLOYED": commit,
    }
    api = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    pages = ["mlflow", "server", "--host", "127.0.0.1", "--port", ui_port, "--workers", "1"]
    services = [
        Service("prefect", api, env, root, lambda: _answers(url), (port, "MEMGPT_PREFECT_PORT")),
        Service("mlflow", pages, env, root, lambda: _answers(ui), (ui_port, "MEMGPT_MLFLOW_PORT")),
    ]
    theirs = {"prefect": "PREFECT_API_URL" in os.environ, "mlflow": store.startswith("http")}
    ours = [one for one in services if not theirs[one.name]]
    for one in ours:
        board.say(f"  {one.name:<12}{one.start()}")
    for one in ours:
        one.wait()
    atomic.write_text(UP / "api", url)

    with temporary_settings({PREFECT_API_URL: url}):
        workspace.mark_crashed(crashed)
        alerts.ensure(days)
        with _schedules_as_they_were():
            _deploy(env, root)
        board.say(f"  {'deployments':<12}of commit {commit[:12]}")
        command = ["prefect", "worker", "start", "--pool", POOL, "--name", socket.gethostname()]
        worker = Service("worker", command, {**env, "PYTHONPATH": str(place)}, place, _online)
        board.say(f"  {worker.name:<12}{worker.start()}")
        worker.wait()
    board.say("")
    board.say(f"Prefect  {url.removesuffix('/api')}   runs, schedules, approvals")
    board.say(f"MLflow   {tracking.shown(ui)}   curves, models, promotions")
    board.say(f"logs     {UP}/*.log      stop: make down")


def down() -> None:
    board = Board()
    for name in ("worker", "mlflow", "prefect"):
        board.say(f"  {name:<12}{'stopped' if stop(name) else 'did not run'}")


def _free(name: str, port: str, setting: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(port)))
        except (ValueError, OverflowError):
            raise UserError(f"{setting}={port}: expected a port, a number up to 65535") from None
        except OSError:
            raise UserError(f"port {port}: taken by another program; set {setting} to a free one for {name}") from None


def _answers(url: str) -> bool:
    return tracking.no_server(url, 5) is None


def _online() -> bool:
    """Whether the server has heard from a worker recently."""
    online = WorkerFilter(status=WorkerFilterStatus(any_=["ONLINE"]))
    with get_client(sync_client=True) as client:
        return bool(client.read_workers_for_work_pool(POOL, worker_filter=online))


def _number(name: str, usual: str) -> float:
    try:
        return float(os.environ.get(name, usual))
    except ValueError:
        raise UserError(f"{name}={os.environ[name]}: expected a number of days") from None


@contextmanager
def _schedules_as_they_were() -> Iterator[None]:
    """Keeps schedules on or off as set in the UI: deploying recreates them with the settings of prefect.yaml."""
    with get_client(sync_client=True) as client:

        def found() -> Iterator[tuple[str, UUID, DeploymentSchedule]]:
            for deployment in client.read_deployments():
                for schedule in deployment.schedules:
                    yield f"{deployment.name} {schedule.schedule!r}", deployment.id, schedule

        before = {name: schedule.active for name, _, schedule in found()}
        yield
        for name, deployment, schedule in list(found()):
            if before.get(name, schedule.active) != schedule.active:
                client.update_deployment_schedule(deployment, schedule.id, active=before[name])


def _deploy(env: dict[str, str], root: Path) -> None:
    for command in (
        ["prefect", "work-pool", "create", POOL, "--type", "process", "--overwrite"],
        ["prefect", "--no-prompt", "deploy", "--all"],
    ):
        done = subprocess.run([sys.executable, "-m", *command], env=env, cwd=root, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(command)}: {(done.stdout + done.stderr).strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flows.up", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--down", action="store_true", help="stop what this started")
    environment.prepare()
    down() if parser.parse_args().down else up()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
