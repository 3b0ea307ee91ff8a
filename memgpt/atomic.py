"""Atomic writes: a kill at any moment leaves the old file or the new one, never a partial one. Temporary folders that a
kill leaves behind are recognised and removed by `memgpt gc`.
"""

import fcntl
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

TEMPORARY = "memgpt-temporary-"  # prefix of the names of `temporary` folders


@contextmanager
def replacing(target: Path | str) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or a directory to; on success it replaces `target`.

    A file is replaced in one step. A directory is moved away first, so between the two renames readers find none.
    The names of these paths start with a dot and end in `.partial`. The next writer removes what a killed one left
    behind, and restores the directory that it had moved away.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    aside = _beside(target, "")
    try:
        yield aside
        _sync(aside)
        if aside.is_dir():
            if target.exists():
                old = _beside(target, ".old")
                target.rename(old)
                aside.rename(target)
                _remove(old)
            else:
                aside.rename(target)
        else:
            aside.replace(target)
        _fsync(target.parent)
    finally:
        if aside.exists():
            _remove(aside)


def write_text(target: Path | str, text: str) -> None:
    with replacing(target) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(target: Path | str, value: Any) -> None:
    """Byte-stable JSON: sorted keys, two spaces, a final newline; NaN and infinity are refused."""
    write_text(target, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def temporary() -> Iterator[Path]:
    """A folder readable by this user only, removed with the `with`. After a kill it is unlocked, so gc removes it."""
    descriptor = None
    while descriptor is None:
        folder = Path(tempfile.mkdtemp(prefix=TEMPORARY))
        descriptor = share(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def share(folder: Path) -> int | None:
    """Lock a folder itself, shared, so that gc leaves it alone; return the descriptor, or None if gc was faster.

    The system releases the lock when the process ends, however that happens.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink and folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
        return descriptor
    os.close(descriptor)  # the locked folder was removed meanwhile
    return None


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{kind}.partial"


def _sweep(target: Path) -> None:
    """Clean up after dead writers of this target; what belongs to living ones, or to longer target names, stays."""
    form = re.compile(rf"\.{re.escape(target.name)}\.(\d+)-[0-9a-f]{{8}}(\.old)?\.partial")
    for leftover in list(target.parent.iterdir()):
        match = form.fullmatch(leftover.name)
        if match is None or psutil.pid_exists(int(match[1])):
            continue
        with suppress(FileNotFoundError):  # another process may sweep at the same time
            if match[2] and not target.exists():
                leftover.rename(target)
            else:
                _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    if path.is_dir():
        for child in path.rglob("*"):
            if child.is_file():
                _fsync(child)
    _fsync(path)
