"""What piles up, and what must not be lost: gc, backup and upgrade. Safe while stages, flows and servers run."""

import fcntl
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from memgpt import atomic, checkpoint, processes, provenance
from memgpt.errors import UserError

BACKUPS = Path(".memgpt/backups")
WORKSPACE = Path(".memgpt/workspace")  # where deployed runs work; it shares DVC's cache
UP = Path(".memgpt/up")  # what `make up` started, and its logs
RETRAIN = Path(".memgpt/retrain.lock")  # held by a running flow
_DAY = 86400.0


@dataclass(frozen=True)
class Item:
    """What gc found. kept: why it stays; empty: it is removed, or would be."""

    what: str
    bytes: int
    kept: str = ""


def gc(days: float, dry_run: bool) -> Iterator[Item]:
    """Remove checkpoints, worktrees and temporary folders that no process works in and that are older than `days`, then
    what no commit, experiment or present file names from DVC's cache.

    A lock tells what is in use, not a file with a process id: it ends with its process.
    """
    checkpoints = [*checkpoint.ROOT.glob("*"), *(WORKSPACE / checkpoint.ROOT).glob("*")]
    for place in sorted(path for path in (*checkpoints, *_temporary()) if path.is_dir()):
        with suppress(FileNotFoundError), _unused(place) as unused:  # processes come and go meanwhile
            yield _dispose(place, unused, days, dry_run)
    for place in sorted(path for path in provenance.WORKTREES.glob("*") if path.is_dir()):
        lock = place.with_name(f"{place.name}.lock")
        lock.touch()
        with suppress(FileNotFoundError), _unused(lock) as unused:
            yield _dispose(place, unused, days, dry_run)
    subprocess.run(["git", "worktree", "prune"], capture_output=True, check=False)
    if Path(".dvc").is_dir():
        yield _cache(dry_run)


def service(name: str) -> psutil.Process | None:
    """A process that `make up` started, if it still runs: it holds a lock on the note of its id, which ends with it. An
    id may be used again, and when a process began looks different once the clock was set.
    """
    note = UP / f"{name}.json"
    with suppress(FileNotFoundError, json.JSONDecodeError, psutil.NoSuchProcess), _unused(note, fcntl.LOCK_SH) as free:
        if not free:
            return psutil.Process(json.loads(note.read_text(encoding="utf-8"))["pid"])
    return None


def running() -> str | None:
    """The flow or stage that works here or in the workspace now, if any."""
    return works_in(Path()) or works_in(WORKSPACE)


def works_in(root: Path) -> str | None:
    """The flow or stage that works in a checkout now, if any."""
    if (root / RETRAIN).exists():
        with _unused(root / RETRAIN, fcntl.LOCK_SH) as free:
            if not free:
                return f"memgpt retrain (process {(root / RETRAIN).read_text(encoding='utf-8').partition(' ')[0]})"
    for folder, _, files in os.walk(root / ".dvc/tmp"):  # experiments may have a folder and a lock of their own there
        with suppress(OSError, json.JSONDecodeError):  # gone, or being written
            text = Path(folder, "rwlock").read_text(encoding="utf-8") if "rwlock" in files else "{}"
            for held in json.loads(text).values():
                for holder in (held.get("write"), *held.get("read", [])):
                    if holder and psutil.pid_exists(holder["pid"]):
                        return f"{holder['cmd']} (process {holder['pid']})"
    return None


def _temporary() -> Iterator[Path]:
    """This user's temporary folders of `atomic`, which a kill leaves: copies of versions and of texts."""
    for path in Path(tempfile.gettempdir()).glob(f"{atomic.TEMPORARY}*"):
        with suppress(FileNotFoundError):
            if path.lstat().st_uid == os.getuid():
                yield path


def _dispose(place: Path, unused: bool, days: float, dry_run: bool) -> Item:
    size = _size(place)
    if not unused:
        return Item(str(place), size, "in use")
    folders = [place, *(Path(folder) for folder, _, _ in os.walk(place))]  # with `place`: one that is gone raises
    age = (time.time() - max(folder.stat().st_mtime for folder in folders)) / _DAY
    if age < days:
        return Item(str(place), size, f"{age:.1f} days old")
    if not dry_run:
        shutil.rmtree(place)
    return Item(str(place), size)


@contextmanager
def _unused(path: Path, lock: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Whether nobody holds a lock on the file or directory; nobody gets one meanwhile.

    lock: LOCK_SH to look for an exclusive one, since two that look at once must not take each other for its holder.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _cache(dry_run: bool) -> Item:
    """With a stage at work the cache is left alone: what it has read or written is not yet in dvc.lock."""
    if busy := running():
        return Item("DVC's cache", 0, f"{busy} works here")
    where = processes.said([sys.executable, "-m", "dvc", "cache", "dir"], "DVC's cache")
    before = _size(Path(where))
    named = ["--workspace", "--all-commits", "--all-experiments", "--skip-failed"]  # some old dvc.yaml may not parse
    named += ["--projects", str(WORKSPACE)] if WORKSPACE.is_dir() else []
    command = [sys.executable, "-m", "dvc", "gc", *named, "--force"]
    if dry_run:
        return Item(where, before, processes.said([*command, "--dry"], "DVC's cache").splitlines()[-1])
    processes.said(command, "DVC's cache")
    return Item(f"{where} (unused objects)", before - _size(Path(where)))


def _size(path: Path) -> int:
    """Bytes of the files below, which may come and go meanwhile: os.walk, unlike rglob, passes over what is gone."""
    total = 0
    for folder, _, files in os.walk(path):
        for file in files:
            with suppress(FileNotFoundError):
                total += Path(folder, file).lstat().st_size
    return total


# --- databases ----------------------------------------------------------------


def theirs() -> dict[str, str]:
    """The operator's own databases, not ours to back up or upgrade: the file that one stands for → how, in a line."""
    told = "{} names what is yours to back up and to upgrade: {}"
    found = {}
    if not _mlflow().startswith("sqlite:///"):
        found["mlflow.db"] = told.format("MLFLOW_TRACKING_URI", "pg_dump, `mlflow db upgrade URI`")
    variable, url = _prefect()
    if not url.startswith("sqlite"):
        found["prefect.db"] = told.format(variable, "pg_dump, `prefect server database upgrade`")
    return found


def databases() -> dict[str, Path]:
    """The SQLite files of MLflow and of the local Prefect server, those that are there and in use."""
    files = {"mlflow.db": _mlflow(), "prefect.db": _prefect()[1]}
    found = {name: Path(url.partition(":///")[2].partition("?")[0]) for name, url in files.items()}
    return {name: path for name, path in found.items() if name not in theirs() and path.is_file()}


def _mlflow() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def _prefect() -> tuple[str, str]:
    """The variable that says which database the Prefect server uses, if any does, and its URL; of another than SQLite's
    only the beginning."""

    def said(key: str) -> tuple[str, str]:
        names = f"PREFECT_API_DATABASE_{key}", f"PREFECT_SERVER_DATABASE_{key}"  # the latter since 3.1
        return next(((name, os.environ[name]) for name in names if os.environ.get(name)), ("", ""))

    variable, url = said("CONNECTION_URL")
    if not url:
        variable, driver = said("DRIVER")
        file = (driver and said("NAME")[1]) or Path(os.environ.get("PREFECT_HOME", ".prefect"), "prefect.db")
        url = f"{driver or 'sqlite'}:///{file}"
    return variable, url


def backup(folder: Path) -> list[Path]:
    """Copy the databases to a new folder named by the time (UTC), each as it is at one moment, whoever writes.

    SQLite's online backup: copying the file would miss what is still in its log, or tear a page.

    Raises:
        UserError: if there is none, or one is damaged.
    """
    found = databases()
    if not found:
        why = "; ".join(theirs().values()) or "run the command in the root of the checkout"
        raise UserError(f"mlflow.db: not here, nor .prefect/prefect.db; {why}")
    target = folder / datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    with atomic.replacing(target) as aside:
        aside.mkdir()
        for name, path in found.items():
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(aside / name)) as copy:
                try:
                    source.backup(copy)
                    told = copy.execute("PRAGMA quick_check").fetchone()[0]
                except sqlite3.DatabaseError as error:
                    told = str(error)
            if told != "ok":
                raise UserError(f"{path}: damaged ({told.splitlines()[0]}); restore it from an earlier backup")
    return [target / name for name in found]


def upgrade() -> tuple[list[Path], list[Path]]:
    """Bring the databases to the schema of the installed MLflow and Prefect; the backups made first, the upgraded.

    Raises:
        UserError: if a run goes on, or an upgrade fails, naming the backup to go back to.
    """
    if busy := running():
        raise UserError(f"{busy} works here; wait for it, or end it, before the databases are upgraded")
    if servers := [name for name in ("prefect", "mlflow", "worker") if service(name)]:
        raise UserError(
            f"what `make up` started runs ({', '.join(servers)}); `make down` before the databases are upgraded"
        )
    saved = backup(BACKUPS)
    found = databases()
    for name, path in found.items():
        uri = f"sqlite:///{path.resolve()}"
        if name == "mlflow.db":
            command = [sys.executable, "-m", "mlflow", "db", "upgrade", uri]
        else:
            command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
        processes.said(command, f"{path}: not upgraded; the backup is {saved[0].parent}")
    return saved, list(found.values())
