"""retrain: snapshot the sources, run the stages of dvc.yaml that changed, promote what the gate lets through.

A task runs one stage, through `dvc repro --single-item`, so that operators and data scientists share one cache. Tasks
wait for those they depend on and then for one of a few places, among which the cores are divided.
"""

import argparse
import fcntl
import heapq
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from flows import server
from memgpt import config, console, environment, tracking
from memgpt.errors import UserError
from memgpt.processes import Children, Stopped
from memgpt.registry import commit_at_start

PLACES = 4  # stages at once, at most: the three tasks and one more
BUSY = (1, 2, 4, 8, 15, 30, 60)  # seconds to wait when somebody else's `dvc repro` holds a stage
_DVC_SAYS = (
    "Running stage",
    "> ",
    "Updating lock",
    "Generating lock",
    "To track",
    "To enable",
    "\t",
    "Use `dvc",
    "Stage '",
)


@dataclass(frozen=True)
class Step:
    """A task of the flow: snapshot, a stage of dvc.yaml under its name there, or promote@model."""

    name: str
    after: tuple[str, ...] = ()
    alone: bool = False  # nothing else is ready meanwhile: it gets every core
    rank: int = 0  # of several that are ready, the lowest goes first

    @property
    def verb(self) -> str:
        return self.name.partition("@")[0]


def steps(settings: config.Config) -> list[Step]:
    """Every step after those it waits for. No stage starts before all sources are validated."""
    trained = {"base": "pretrain", **{task: f"finetune@{task}" for task in config.TASKS}}
    ingested = tuple(f"ingest@{source}" for source in config.SOURCES)
    trunk = {"base": "pretrain", "multitask": "multitask"}
    start = {task: getattr(settings.finetune, task).start for task in config.TASKS}
    longest_first = ("recommendation", "sentiment", "ner")
    return [
        Step("snapshot"),
        *(Step(f"ingest@{source}", ("snapshot",)) for source in config.SOURCES),
        *(Step(f"validate@{source}", ingested) for source in config.SOURCES),  # it compares texts with another source's
        Step("tokenize", tuple(f"validate@{source}" for source in config.SOURCES), alone=True),
        Step("pretrain", ("tokenize",), alone=True),
        Step("multitask", ("pretrain",), rank=-9 if "multitask" in start.values() else 9),  # 9: nobody waits for it
        *(Step(f"finetune@{task}", (trunk[start[task]],), rank=i - 3) for i, task in enumerate(longest_first)),
        *(Step(f"evaluate@{model}", (trained[model],)) for model in config.MODELS),
        *(Step(f"promote@{model}", (f"evaluate@{model}",)) for model in config.MODELS),
    ]


class Queue:
    """A few places; of those that wait for one, the lowest rank gets it."""

    TOGETHER = 0.3  # seconds in which steps that were freed by the same one all arrive

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: list[tuple[int, int]] = []
        self._changed = threading.Condition()
        self._arrived = 0

    @contextmanager
    def place(self, rank: int) -> Iterator[None]:
        with self._changed:
            self._arrived += 1
            ticket = (rank, self._arrived)
            heapq.heappush(self._waiting, ticket)
        time.sleep(self.TOGETHER)
        with self._changed:
            self._changed.wait_for(lambda: self._free and self._waiting[0] == ticket)
            heapq.heappop(self._waiting)
            self._free -= 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()


class Crew:
    """Runs steps as child processes, a few at once, and tells the console and Prefect's logs what they say.

    A plain class, not a dataclass: Prefect looks for futures inside the dataclasses that a task is given.
    """

    def __init__(self, board: console.Board, cores: int, force: bool, replace: list[str]) -> None:
        self.board, self.force, self.replace = board, force, replace
        self.children = Children()
        self.failures: list[str] = []
        self.places = min(cores, PLACES)
        self.cores = cores
        self._queue = Queue(self.places)

    def run(self, step: Step) -> State[Any]:
        """Run to the end; a failure's message is the stage's own."""
        logger = get_run_logger()
        with self._queue.place(step.rank):
            self.board.begin(step.name)
            said: list[str] = []

            def hear(line: str) -> None:
                said.append(line)
                logger.info(line)
                if not line.startswith(_DVC_SAYS) and ": done in " not in line:
                    self.board.note(step.name, line)

            status = self._repeat_while_busy(step, said, hear)
            return self._finish(step, status, said)

    def _repeat_while_busy(self, step: Step, said: list[str], hear: Any) -> int:
        for pause in (*BUSY, None):
            said.clear()
            status = self.children.run(self._command(step), self._environment(step), hear)
            busy = status != 0 and any(" is busy, it is being blocked by" in line for line in said)
            if not busy or pause is None:
                return status
            self.board.note(step.name, f"another dvc is at it; trying again in {pause} s")
            time.sleep(pause)
        raise AssertionError("the last pause is None")

    def _finish(self, step: Step, status: int, said: list[str]) -> State[Any]:
        if status == 0:
            done = _outcome(said)
            self.board.end(step.name, done, "dim" if done != "done" else "")
            return Completed(message=done)
        reason = _reason(said) or f"ended with status {status}"
        self.board.end(step.name, "failed", "red")
        if _reason(said) is None:  # not a user's mistake: show what there is
            self.board.say("\n".join(said[-30:]))
        self.failures.append(f"{step.name}: {reason}")
        return Failed(message=f"{step.name}: {reason}")

    def _command(self, step: Step) -> list[str]:
        verb, _, item = step.name.partition("@")
        if verb == "snapshot":
            return [sys.executable, "-m", "memgpt.cli", "snapshot"]
        if verb == "promote":
            flags = ["--replace"] if item in self.replace else []
            return [sys.executable, "-m", "memgpt.cli", "promote", item, *flags]
        return [sys.executable, "-m", "dvc", "repro", "--single-item", *(["--force"] if self.force else []), step.name]

    def _environment(self, step: Step) -> dict[str, str]:
        threads = str(self.cores if step.alone else max(1, self.cores // self.places))
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # dvc.yaml says `memgpt`
            "SHELL": "/bin/sh",  # which runs it
            "PYTHONUNBUFFERED": "1",
            "MEMGPT_THREADS": threads,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
            "PREFECT__FLOW_RUN_ID": str(flow_run.id or ""),
        }


def _outcome(said: list[str]) -> str:
    if any("didn't change, skipping" in line for line in said):
        return "skipped (unchanged)"
    if any("is cached - skipping run" in line for line in said):
        return "restored from the cache"
    return "done"


def _reason(said: list[str]) -> str | None:
    """The stage's `error: …`, else what DVC itself found wrong; None where a stack trace must do."""
    for start in ("error: ", "ERROR: "):
        for line in reversed(said):
            if line.startswith(start) and "failed to run: memgpt" not in line:
                return line.removeprefix(start)
    return None


@task(cache_policy=NO_CACHE)  # DVC is the only cache
def run_step(step: Step, crew: Crew) -> State[Any]:
    try:
        return crew.run(step)
    except Stopped:
        return Failed(message=f"{step.name}: stopped with the flow")


@flow(name="retrain", task_runner=ThreadPoolTaskRunner(max_workers=64), validate_parameters=False)
def retrain(force: bool = False, replace: list[str] | None = None) -> State[Any]:
    """Bring every model up to date with its sources.

    force: run unchanged stages too. replace: models that may replace a champion they cannot be compared with.
    """
    environment.prepare()
    settings = config.load()
    with _only_one(), console.Board() as board:
        _note_commit()
        shutil.rmtree(console.VERDICTS, ignore_errors=True)  # so that what is there at the end is of this run
        crew = Crew(board, environment.threads(settings.runtime.threads), force, replace or [])
        try:
            with tracking.flow_run("retrain", settings.model_dump(by_alias=True)):
                futures: dict[str, PrefectFuture[Any]] = {}
                for step in steps(settings):
                    named = run_step.with_options(name=step.verb, task_run_name=step.name)
                    before = [futures[name] for name in step.after]
                    futures[step.name] = named.submit(step, crew, wait_for=before, return_state=False)
                wait(list(futures.values()))
        finally:
            crew.children.stop()
    return _conclude(crew.failures)


def _conclude(failures: list[str]) -> State[Any]:
    """Show the verdicts in the UI; the flow fails with what the failed stages said."""
    found = console.verdicts()
    if found:
        _publish(found)
    if failures:
        return Failed(message="\n".join(failures))
    return Completed(message=", ".join(f"{verdict['model']} {verdict['verdict']}" for verdict in found))


def _publish(found: list[dict[str, Any]]) -> None:
    table = console.rows(found)
    create_table_artifact(table=table, key="retrain-metrics", description="Test metrics, baselines and verdicts")
    summary = [f"**{verdict['model']}**: {verdict['verdict']}, {'; '.join(verdict['reasons'])}" for verdict in found]
    create_markdown_artifact("\n".join(f"- {line}" for line in summary), key="retrain-summary", description="Verdicts")
    uri = console.tracking_uri()
    mlflow = uri if uri.startswith("http") else "http://127.0.0.1:5000"
    for verdict in found:
        name = f"memgpt-{verdict['model']}"
        create_link_artifact(f"{mlflow}/#/models/{name}", key=name, link_text=f"{name} in the MLflow registry")
    for source in config.SOURCES:
        page = Path(f"reports/validation/{source}.html").resolve()
        create_link_artifact(page.as_uri(), key=f"validation-{source}", link_text=f"validation of {source}")


def _note_commit() -> None:
    """The lineage names the commit that the run began with; HEAD may move meanwhile."""
    sha, dirty = commit_at_start(Path())
    os.environ["MEMGPT_COMMIT"] = f"{sha}-dirty" if dirty else sha


@contextmanager
def _only_one() -> Iterator[None]:
    """One retrain per checkout: the system drops the lock when its holder dies.

    Raises:
        UserError: if another one runs.
    """
    lock = Path(".memgpt/retrain.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"retrain already runs here (process {file.read()}); wait for it, or end it") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def main() -> int:
    """`python -m flows.retrain`, which `memgpt retrain` becomes. 0: every model has a champion, none was rejected."""
    parser = argparse.ArgumentParser(prog="python -m flows.retrain", description="What `memgpt retrain` runs.")
    parser.add_argument("--force", action="store_true", help="run unchanged stages too")
    parser.add_argument("--replace", action="append", default=[], choices=config.MODELS)
    options = parser.parse_args()
    environment.prepare()
    with _only_one():  # told before anything starts; the flow takes the lock again for itself
        pass
    out = console.Board()
    out.say("starting the flow's server")
    with server.running() as url:
        out.say(f"retrain: watch it at {url.removesuffix('/api')}")
        state = retrain(options.force, options.replace, return_state=True)
        found = console.verdicts()
        if found:
            out.say("")
            out.table(console.rows(found))
    if not state.is_completed():
        for line in (state.message or "the flow did not finish").splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 1
    out.say("")
    out.say("\n".join(console.ways_to_look()))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
