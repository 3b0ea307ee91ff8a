"""Runs the cells of a benchmark that have no result yet: each in a process with one thread, several at a time."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm


def done(results: Path, name: str, spec: dict[str, Any]) -> dict[str, Any] | None:
    """A cell's result, if there is one for exactly this spec; else None."""
    path = results / f"{name}.json"
    cell = json.loads(path.read_text()) if path.exists() else None
    return cell if cell and cell["spec"] == spec else None


def run(
    cells: list[tuple[str, dict[str, Any]]],
    jobs: int,
    script: Path,
    results: Path,
    logs: Path,
    again: Container[str] = (),
) -> None:
    """Run `script NAME SPEC` per cell; it writes `results/NAME.json`. A cell waits for those that its spec names in
    `start` (one) and `after` (a list). again: cells to run even if they have a result."""
    specs = dict(cells)
    waiting = [(name, spec) for name, spec in cells if name in again or not done(results, name, spec)]
    unfinished = {name for name, _ in waiting}
    running: set[str] = set()
    with tqdm(total=len(waiting), desc="cells", unit="cell") as bar, ThreadPoolExecutor(jobs) as pool:

        def one(name: str, spec: dict[str, Any]) -> None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            log = logs / f"{name}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as lines:
                command = [sys.executable, str(script), name, json.dumps(spec)]
                status = subprocess.run(command, env=environment, stdout=lines, stderr=lines).returncode
            if status:
                tqdm.write(f"{name} failed, see {log}", file=sys.stderr)
            else:
                unfinished.discard(name)
            running.discard(name)
            bar.update()

        def can_start(spec: dict[str, Any]) -> bool:
            before = [*spec.get("after", ()), *([spec["start"]] if "start" in spec else ())]
            return all(name not in unfinished and done(results, name, specs[name]) for name in before)

        while waiting:
            ready = next((cell for cell in waiting if can_start(cell[1])), None)
            if ready is None and not running:
                raise SystemExit(f"cells that could not start, since the one before failed: {[n for n, _ in waiting]}")
            if ready is None or len(running) >= jobs:
                time.sleep(0.5)
                continue
            waiting.remove(ready)
            running.add(ready[0])
            pool.submit(one, *ready)
