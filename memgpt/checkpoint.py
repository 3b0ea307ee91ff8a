"""Checkpoints from which a long stage resumes, in `.memgpt/checkpoints/<stage>-<key>`, outside git and DVC.

The key is a hash of parameters, inputs and code, so a run never resumes a different configuration. (A DVC `persist`
output would do so, and would disable the run cache.)
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
_held: dict[Path, int] = {}  # directories in use by this process → their file descriptors
COMPLETE = "complete"  # the marker file in a completely written checkpoint


def directory(stage: str, params: dict[str, Any], inputs: list[Path]) -> Path:
    """The stage's checkpoint directory, created if missing, and protected from `memgpt gc` while this process lives."""
    key = hashlib.sha256(json.dumps(params, sort_keys=True).encode())
    for path in inputs:
        key.update(digest(path).encode())
    for module in sorted(Path(__file__).parent.rglob("*.py")):
        key.update(module.read_bytes())
    place = ROOT / f"{stage}-{key.hexdigest()[:16]}"
    _hold(place)
    return place


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint; one whose writing was interrupted by a kill lacks the marker file."""
    found = [path.parent for path in directory.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def of_step(directory: Path | str, step: int) -> Path:
    return Path(directory) / f"checkpoint-{step}"


def sweep(directory: Path) -> None:
    """Remove incomplete checkpoints left by a kill. The next run rewrites them, perhaps in another number of parts."""
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
