"""Where a long stage keeps what it needs to resume: `.memgpt/checkpoints/<stage>-<key>`, outside git and DVC.

The key is a hash of the parameters, the inputs and the code, so that a run only ever resumes itself. (A DVC `persist`
output would switch off the run cache and resume another configuration.)
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from memgpt.lineage import digest

ROOT = Path(".memgpt/checkpoints")
COMPLETE = "complete"  # the mark in a checkpoint that was written to its end


def directory(stage: str, params: dict[str, Any], inputs: list[Path]) -> Path:
    key = hashlib.sha256(json.dumps(params, sort_keys=True).encode())
    for path in inputs:
        key.update(digest(path).encode())
    for module in sorted(Path(__file__).parent.rglob("*.py")):
        key.update(module.read_bytes())
    return ROOT / f"{stage}-{key.hexdigest()[:16]}"


def latest(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end; a kill while writing leaves one without the mark."""
    found = [path.parent for path in directory.glob(f"checkpoint-*/{COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def discard(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
