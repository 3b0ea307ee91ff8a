"""Terminal output while a flow runs, and at its end."""

import json
import os
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from memgpt import tracking
from memgpt.config import MODELS

VERDICTS = Path(".memgpt/verdicts")
STYLES = {"promote": "green", "unchanged": "dim", "hold": "yellow", "reject": "red"}


class Board:
    """A line per stage when it ends. Meanwhile a terminal shows a live line with the stage's last message; elsewhere,
    such as in a log, its messages are printed at most every ten seconds. Any thread may call."""

    EVERY = 10.0  # seconds

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<24}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._lock = threading.Lock()
        self._rows: dict[str, tuple[TaskID, float]] = {}
        self._told: dict[str, float] = {}

    def __enter__(self) -> "Board":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def begin(self, name: str) -> None:
        with self._lock:
            now = time.monotonic()
            self._rows[name] = (self._live.add_task(name, note=""), now)
            self._told[name] = now

    def note(self, name: str, text: str) -> None:
        """Show a message of the stage; `pretrain: step 40/400` is shown without the stage's name."""
        with self._lock:
            if name not in self._rows:
                return
            text = text.removeprefix(f"{name.partition('@')[0]}: ")
            if self.console.is_terminal:
                self._live.update(self._rows[name][0], note=text[:100].replace("[", r"\["))
            elif time.monotonic() - self._told[name] > self.EVERY:
                self._told[name] = time.monotonic()
                self.console.print(f"  {name:<24}{text}", markup=False)

    def end(self, name: str, outcome: str, style: str = "") -> None:
        with self._lock:
            seconds = 0.0
            if name in self._rows:  # the stage may have failed before `begin`
                row, began = self._rows.pop(name)
                self._live.remove_task(row)
                seconds = time.monotonic() - began
            self.console.print(f"  {name:<24}{outcome:<24}{seconds:6.1f} s", markup=False, style=style)

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, markup=False, style=style)

    def table(self, rows: Sequence[dict[str, str]]) -> None:
        """Print `rows` as a table; it is not cut for a narrow terminal, which wraps it."""
        drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for name in rows[0]:
            drawn.add_column(name, justify="right" if name in ("value", "baseline", "champion", "version") else "left")
        for row in rows:
            drawn.add_row(*row.values(), style=STYLES.get(row["verdict"], ""))
        Console(file=self.console.file, width=max(100, self.console.width)).print(drawn, crop=False)


def verdicts() -> list[dict[str, Any]]:
    """The verdicts of this run's promotions, in the order of the models; a model that was not judged has none."""
    found = []
    for model in MODELS:
        with suppress(FileNotFoundError):
            found.append(json.loads((VERDICTS / f"{model}.json").read_text(encoding="utf-8")))
    return found


def rows(found: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The table at the end of a run, as text."""
    return [
        {
            "task": verdict["model"],
            "metric": verdict["metric"],
            "value": f"{verdict['value']:.3f}",
            "95 % interval": f"{verdict['ci_low']:.3f} to {verdict['ci_high']:.3f}",
            "baseline": f"{verdict['baseline']:.3f}",
            "champion": f"{verdict['champion']:.3f}" if verdict["champion"] is not None else "",
            "verdict": verdict["verdict"],
            "version": str(verdict["version"]),
        }
        for verdict in found
    ]


def tracking_uri() -> str:
    """The tracking store's URI for display, without a password."""
    return tracking.shown(tracking.location())


def ui_hints() -> list[str]:
    """How to open each UI and how to load a model, as lines."""
    uri = tracking_uri()
    server = tracking.shown(os.environ.get("PREFECT_API_URL", "").removesuffix("/api"))
    lines = [] if shutil.which("memgpt") else ["first    source .venv/bin/activate"]
    if server:
        lines.append(f"Prefect  {server}")
    else:
        lines.append("Prefect  make up      then open http://127.0.0.1:4200")
    if uri.startswith("http"):
        lines.append(f"MLflow   {uri}")
    else:
        lines.append("MLflow   make up      then open http://127.0.0.1:5000")
    return [
        *lines,
        'ask      memgpt predict ner@champion "Ada Brandt of Norvale Systems opened a plant in Westhaven."',
        f'load     mlflow.set_tracking_uri("{uri}")',
        '         mlflow.pyfunc.load_model("models:/memgpt-ner@champion").predict(["Ada Brandt of Norvale Systems"])',
    ]
