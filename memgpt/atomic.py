"""Writing so that a kill at any moment leaves the old file or the new one, never half of one, and folders of which it
leaves nothing that `memgpt gc` would not know.
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

TEMPORARY = "memgpt-temporary-"  # how the names of `temporary` folders begin


@contextmanager
def replacing(target: Path | str) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or a directory to; on success it takes `target`'s place.

    A file is replaced in one step. A directory is moved away first, so between the two renames a reader finds none.
    Names start with a dot and end in `.partial`; what a killed writer left behind is swept away by the next one, and
    what it had moved away comes back.
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
    """A folder for this user's eyes only, gone with the `with`. What a kill leaves of it is not locked, and gc's."""
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
    """The descriptor of a shared lock on a folder itself, which gc then leaves alone; None if gc was faster.

    The system drops the lock when the process dies, however that ends.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink and folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
        return descriptor
    os.close(descriptor)  # what was locked has been removed meanwhile
    return None


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{kind}.partial"


def _sweep(target: Path) -> None:
    """Nothing of a writer that lives, in this process or another, nor of a target with a longer name."""
    form = re.compile(rf"\.{re.escape(target.name)}\.(\d+)-[0-9a-f]{{8}}(\.old)?\.partial")
    for leftover in list(target.parent.iterdir()):
        match = form.fullmatch(leftover.name)
        if match is None or psutil.pid_exists(int(match[1])):
            continue
        with suppress(FileNotFoundError):  # somebody else sweeps here too
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
