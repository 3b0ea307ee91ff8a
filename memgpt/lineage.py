"""Where a model directory came from: `lineage.json`, which is deterministic and written when the stage ends."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from memgpt import atomic
from memgpt.errors import UserError

FILE = "lineage.json"
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")


def digest(path: Path | str) -> str:
    """sha256 of a file, or of a directory's relative names and contents in order (dot files left out)."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    total = hashlib.sha256()
    for child in sorted(path.rglob("*")):
        if child.is_file() and not child.name.startswith("."):
            total.update(f"{child.relative_to(path).as_posix()}\0{digest(child)}\n".encode())
    return total.hexdigest()


def weights_digest(directory: Path | str) -> str:
    """sha256 over a model directory's weights and configuration, with those of an ensemble's members, and, for
    recommendation, its item index. Equal digests mean the same model.

    Raises:
        UserError: if the directory holds no weights.
    """
    directory = Path(directory)
    files = sorted(file for kind in ("*.safetensors", "items.json", "config.json") for file in directory.rglob(kind))
    if not any(file.suffix == ".safetensors" for file in files):
        raise UserError(
            f"{directory}: holds no *.safetensors; run the stage that makes it, or `dvc checkout {directory}`"
        )
    return hashlib.sha256("".join(f"{f.relative_to(directory)}\0{digest(f)}\n" for f in files).encode()).hexdigest()


def write(
    directory: Path,
    stage: str,
    inputs: list[Path],
    params: dict[str, Any],
    parent: Path | None,
    seed: int,
    metrics: dict[str, float],
) -> None:
    """Write `lineage.json` into a finished model directory; `inputs` are recorded as given, relative to the root."""
    atomic.write_json(
        directory / FILE,
        {
            "stage": stage,
            "inputs": {path.as_posix(): digest(path) for path in inputs},
            "params": params,
            "parent": weights_digest(parent) if parent else None,
            "seed": seed,
            "versions": libraries(),
            "metrics": metrics,
        },
    )


def libraries() -> dict[str, str]:
    """The versions of the libraries on which a model's bytes depend."""
    return {library: version(library).partition("+")[0] for library in _LIBRARIES}


def read(directory: Path | str) -> dict[str, Any]:
    """The lineage of a model directory.

    Raises:
        UserError: if it is missing or not JSON.
    """
    path = Path(directory) / FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run the stage that makes {directory}") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not JSON at line {error.lineno}; run the stage that makes {directory} again"
        ) from None
