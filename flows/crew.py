"""The steps of a retrain and who runs them: child processes, a few at once, among which the cores are divided."""

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

PLACES = 4  # stages at once, at most: the three tasks and one more
_PASSING = (  # after which a step is tried again
    " is busy, it is being blocked by",  # somebody else's `dvc repro` holds the stage
    "Unable to acquire lock",  # another holds the repository while it reads it, on a busy machine longer than DVC waits
    tracking.NO_SERVER,
    tracking.NO_DATABASE,
    "database is locked",
)
_DVC_SAYS = ("Running stage", "> ", "Stage '")  # not news on the console, where each stage has a line
_DVC_HINTS = ("Updating lock", "Generating lock", "To track", "To enable", "\t", "Use `dvc")  # not ours to follow


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


def steps(settings: config.Config, tasks: Sequence[str] = config.TASKS) -> list[Step]:
    """Every step after those it waits for. No stage starts before all sources are validated.

    tasks: which of them are trained, judged and promoted, beside the core.
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
        *(Step(f"validate@{source}", ingested) for source in config.SOURCES),  # it compares texts with another source's
        Step("tokenize", tuple(f"validate@{source}" for source in config.SOURCES), alone=True),
        Step("pretrain", ("tokenize",), alone=True),
        *([Step("multitask", ("pretrain",), rank=-9 if awaited else 9)] if awaited or every else []),
        *(Step(f"finetune@{task}", (trunk[start[task]],), rank=i - 3) for i, task in enumerate(longest_first)),
        *(Step(f"evaluate@{model}", (trained[model],)) for model in models),
        *(Step(f"promote@{model}", (f"evaluate@{model}",)) for model in models),
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


@dataclass(frozen=True)
class Order:
    """What a run is asked for, see `retrain`."""

    tasks: tuple[str, ...] = config.TASKS
    force: bool = False
    replace: tuple[str, ...] = ()
    ask: bool = False


class Progress:
    """What a stage says of its training, as a progress artifact in the UI. Without the server, or where somebody has
    deleted the artifact, the stage goes on all the same."""

    PAUSE = 60.0  # seconds without another attempt: one takes as long where nobody answers
    _SAID = re.compile(r"step (?P<step>\d+)/(?P<steps>\d+), (?P<loss>loss \S+, )?(?P<left>\d+) s left")

    def __init__(self, name: str, tokens: int = 0) -> None:
        """tokens: of a step, where all have as many."""
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
    """Runs steps as child processes, a few at once, and tells the console and Prefect's logs what they say.

    A plain class, not a dataclass: Prefect looks for futures inside the dataclasses that a task is given.
    """

    def __init__(self, board: console.Board, cores: int, order: Order, tokens: dict[str, int] | None = None) -> None:
        """tokens: stage → tokens of one of its training steps, where it is known."""
        self.board, self.order, self.tokens = board, order, tokens or {}
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
        if _reason(said) is None:  # not a user's mistake: show what there is
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
