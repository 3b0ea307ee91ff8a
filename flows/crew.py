"""The steps of a retrain and the crew that runs them: child processes, a few at a time, which share the cores."""

import heapq
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State

from memgpt import config, console, tracking
from memgpt.processes import Children

PLACES = 4  # maximum number of stages at a time: the three tasks and one more
_PASSING = (  # messages of temporary failures, after which a step is retried
    " is busy, it is being blocked by",  # another `dvc repro` holds the stage
    "Unable to acquire lock",  # another one locks the repository while reading it, on a busy machine for too long
    tracking.NO_SERVER,
    tracking.NO_DATABASE,
    "database is locked",
)
_DVC_SAYS = ("Running stage", "> ", "Stage '")  # not shown on the console, where each stage has its own line
_DVC_HINTS = ("Updating lock", "Generating lock", "To track", "To enable", "\t", "Use `dvc")  # dropped: not useful here


@dataclass(frozen=True)
class Step:
    """A task of the flow: snapshot, a stage named as in dvc.yaml, or promote@model."""

    name: str
    after: tuple[str, ...] = ()
    alone: bool = False  # no other step can run meanwhile, so it gets all cores
    rank: int = 0  # of the steps that are ready, the one with the lowest rank starts first

    @property
    def verb(self) -> str:
        return self.name.partition("@")[0]


def steps(settings: config.Config, tasks: Sequence[str] = config.TASKS) -> list[Step]:
    """All steps, each after those it waits for. No stage after validation starts before all sources are validated.

    tasks: which tasks are trained, evaluated and promoted, beside the core.
    """
    trained = {"base": "pretrain", **{task: f"finetune@{task}" for task in config.TASKS}}
    ingested = tuple(f"ingest@{source}" for source in config.SOURCES)
    trunk = {"base": "pretrain", "multitask": "multitask"}
    start = {task: getattr(settings.finetune, task).start for task in tasks}
    longest_first = [task for task in ("recommendation", "sentiment", "ner") if task in tasks]
    models = ("base", *(task for task in config.TASKS if task in tasks))
    awaited, every = "multitask" in start.values(), set(tasks) == set(config.TASKS)
    return [
        Step("snapshot"),
        *(Step(f"ingest@{source}", ("snapshot",)) for source in config.SOURCES),
        *(Step(f"validate@{source}", ingested) for source in config.SOURCES),  # some compare texts with the corpus
        Step("tokenize", tuple(f"validate@{source}" for source in config.SOURCES), alone=True),
        Step("pretrain", ("tokenize",), alone=True),
        *([Step("multitask", ("pretrain",), rank=-9 if awaited else 9)] if awaited or every else []),
        *(Step(f"finetune@{task}", (trunk[start[task]],), rank=i - 3) for i, task in enumerate(longest_first)),
        *(Step(f"evaluate@{model}", (trained[model],)) for model in models),
        *(Step(f"promote@{model}", (f"evaluate@{model}",)) for model in models),
    ]


class Queue:
    """Limits how many steps run at once. Of those waiting for a place, the one with the lowest rank gets it."""

    TOGETHER = 0.3  # seconds to wait, so that all steps that became ready at the same moment are compared by rank

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


@dataclass(frozen=True)
class Order:
    """The parameters of a run, see `retrain`."""

    tasks: tuple[str, ...] = config.TASKS
    force: bool = False
    replace: tuple[str, ...] = ()
    ask: bool = False


class Progress:
    """Shows a stage's training progress as a progress artifact in the UI. The stage continues even if the server is
    away or somebody has deleted the artifact."""

    PAUSE = 60.0  # seconds before another attempt, which takes about as long if the server does not answer
    _SAID = re.compile(r"step (?P<step>\d+)/(?P<steps>\d+), (?P<loss>loss \S+, )?(?P<left>\d+) s left")

    def __init__(self, name: str, tokens: int = 0) -> None:
        """tokens: per training step, if all steps have the same number."""
        self._key, self._tokens = f"progress-{name.replace('@', '-')}", tokens
        self._artifact: UUID | None = None
        self._next = 0.0

    def hear(self, line: str) -> None:
        if not (said := self._SAID.search(line)) or time.monotonic() < self._next:
            return
        step, steps, left = int(said["step"]), int(said["steps"]), int(said["left"])
        share = round(100 * step / steps, 1)
        pace = f"{self._tokens * (steps - step) / left:,.0f} tokens/s, " if self._tokens and left else ""
        text = f"step {step} of {steps}, {said['loss'] or ''}{pace}{left} s left"
        try:
            if self._artifact is None:
                self._artifact = create_progress_artifact(share, key=self._key, description=text)
            else:
                update_progress_artifact(self._artifact, share, description=text)
        except Exception as error:
            get_run_logger().warning(f"no progress to see: {error}")
            self._artifact, self._next = None, time.monotonic() + self.PAUSE


class Crew:
    """Runs steps as child processes, a few at a time, and passes their output to the console and Prefect's logs.

    A plain class, not a dataclass, because Prefect searches dataclasses passed to a task for futures.
    """

    def __init__(self, board: console.Board, cores: int, order: Order, tokens: dict[str, int] | None = None) -> None:
        """tokens: stage → tokens per training step, where known."""
        self.board, self.order, self.tokens = board, order, tokens or {}
        self.children = Children()
        self.failures: list[str] = []
        self.places = min(cores, PLACES)
        self.cores = cores
        self._queue = Queue(self.places)

    def run(self, step: Step) -> State[Any]:
        """Run a step to its end; a failure has the stage's own error message."""
        logger = get_run_logger()
        with self._queue.place(step.rank):
            self.board.begin(step.name)
            said: list[str] = []
            progress = Progress(step.name, self.tokens.get(step.name, 0))

            def hear(line: str) -> None:
                if line.startswith(_DVC_HINTS):
                    return
                said.append(line)
                logger.info(line)
                progress.hear(line)
                if not line.startswith(_DVC_SAYS) and ": done in " not in line:
                    self.board.note(step.name, line)

            status = self._repeat_while_it_may_pass(step, said, hear)
            return self._finish(step, status, said)

    def _repeat_while_it_may_pass(self, step: Step, said: list[str], hear: Any) -> int:
        for pause in (*tracking.PAUSES, None):
            said.clear()
            status = self.children.run(self._command(step), self._environment(step), hear)
            passing = status != 0 and next((line for line in said if any(words in line for words in _PASSING)), None)
            if not passing or pause is None:
                return status
            self.board.note(step.name, f"{passing.strip()}; trying again in {pause} s")
            time.sleep(pause)
        raise AssertionError("the last pause is None")

    def _finish(self, step: Step, status: int, said: list[str]) -> State[Any]:
        if status == 0:
            done = _outcome(said)
            self.board.end(step.name, done, "dim" if done != "done" else "")
            return Completed(message=done)
        if _reason(said) is None:  # no error message, so show the last lines of output
            self.board.say("\n".join(said[-30:]))
        return self.fail(step, _reason(said) or f"ended with status {status}")

    def fail(self, step: Step, reason: str) -> State[Any]:
        self.board.end(step.name, "failed", "red")
        self.failures.append(f"{step.name}: {reason}")
        return Failed(message=f"{step.name}: {reason}")

    def _command(self, step: Step) -> list[str]:
        verb, _, item = step.name.partition("@")
        if verb == "snapshot":
            return [sys.executable, "-m", "memgpt.cli", "snapshot"]
        if verb == "promote":
            flags = [*(["--replace"] if item in self.order.replace else []), *(["--ask"] if self.order.ask else [])]
            return [sys.executable, "-m", "memgpt.cli", "promote", item, *flags]
        return [
            sys.executable,
            "-m",
            "dvc",
            "repro",
            "--single-item",
            *(["--force"] if self.order.force else []),
            step.name,
        ]

    def _environment(self, step: Step) -> dict[str, str]:
        threads = str(self.cores if step.alone else max(1, self.cores // self.places))
        return {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # for dvc.yaml's `memgpt`
            "SHELL": "/bin/sh",  # with which DVC runs it
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
    """The stage's `error: …` line, else DVC's `ERROR: …`; None if there is neither (a stack trace)."""
    for start in ("error: ", "ERROR: "):
        for line in reversed(said):
            if line.startswith(start) and "failed to run: memgpt" not in line:
                return line.removeprefix(start)
    return None
