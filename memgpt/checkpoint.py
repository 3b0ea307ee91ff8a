"""Where a long stage keeps what it needs to resume: `.memgpt/checkpoints/<stage>-<key>`, outside git and DVC.

The key is a hash of the parameters, the inputs and the code, so that a run only ever resumes itself. (A DVC `persist`
output would switch off the run cache and resume another configuration.)
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from memgpt import atomic
from memgpt.lineage import digest

ROOT = Path(".memgpt/checkpoints")
_held: dict[Path, int] = {}  # descriptors of the directories that this process works in
COMPLETE = "complete"  # the mark in a checkpoint that was written to its end


def directory(stage: str, params: dict[str, Any], inputs: list[Path]) -> Path:
    """Where this stage keeps its checkpoints, made if need be, and safe from `memgpt gc` while this process lives."""
    key = hashlib.sha256(json.dumps(params, sort_keys=True).encode())
    for path in inputs:
        key.update(digest(path).encode())
    for module in sorted(Path(__file__).parent.rglob("*.py")):
        key.update(module.read_bytes())
    place = ROOT / f"{stage}-{key.hexdigest()[:16]}"
    _hold(place)
    return place


def latest(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a kill while writing leaves one without the mark."""
    found = [path.parent for path in directory.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def of_step(directory: Path | str, step: int) -> Path:
    return Path(directory) / f"checkpoint-{step}"


def sweep(directory: Path) -> None:
    """Remove what a kill left half written, which the next run writes anew, perhaps in another number of parts."""
    for path in directory.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)


def discard(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    if (descriptor := _held.pop(directory.absolute(), None)) is not None:
        os.close(descriptor)


def _hold(place: Path) -> None:
    while place.absolute() not in _held:
        place.mkdir(parents=True, exist_ok=True)
        if (descriptor := atomic.share(place)) is not None:
            _held[place.absolute()] = descriptor
