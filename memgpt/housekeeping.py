"""Removing unused files, and protecting the databases: gc, backup, upgrade. Safe while stages, flows, servers run."""

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
    """Remove checkpoints, worktrees and temporary folders that no process uses and that are older than `days`, then
    from DVC's cache what no commit, experiment or present file refers to.

    Locks show what is in use, not files with process ids: a lock ends with its process.
    """
    checkpoints = [*checkpoint.ROOT.glob("*"), *(WORKSPACE / checkpoint.ROOT).glob("*")]
    for place in sorted(path for path in (*checkpoints, *_temporary()) if path.is_dir()):
        with suppress(FileNotFoundError), _unused(place) as unused:  # its owner may remove it meanwhile
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
    """A process that `make up` started, if it still runs: it holds a lock on the file with its id. The id alone proves
    nothing, since it may be reused; nor does the start time, which changes if the clock is set.
    """
    note = UP / f"{name}.json"
    with suppress(FileNotFoundError, json.JSONDecodeError, psutil.NoSuchProcess), _unused(note, fcntl.LOCK_SH) as free:
        if not free:
            return psutil.Process(json.loads(note.read_text(encoding="utf-8"))["pid"])
    return None


def running() -> str | None:
    """The flow or stage that is running here or in the workspace, if any."""
    return works_in(Path()) or works_in(WORKSPACE)


def works_in(root: Path) -> str | None:
    """The flow or stage that is running in a checkout, if any."""
    if (root / RETRAIN).exists():
        with _unused(root / RETRAIN, fcntl.LOCK_SH) as free:
            if not free:
                return f"memgpt retrain (process {(root / RETRAIN).read_text(encoding='utf-8').partition(' ')[0]})"
    for folder, _, files in os.walk(root / ".dvc/tmp"):  # experiments may have their own folder and lock there
        with suppress(OSError, json.JSONDecodeError):  # gone, or being written
            text = Path(folder, "rwlock").read_text(encoding="utf-8") if "rwlock" in files else "{}"
            for held in json.loads(text).values():
                for holder in (held.get("write"), *held.get("read", [])):
                    if holder and psutil.pid_exists(holder["pid"]):
                        return f"{holder['cmd']} (process {holder['pid']})"
    return None


def _temporary() -> Iterator[Path]:
    """This user's temporary folders of `atomic`, which a kill leaves behind: copies of versions and of texts."""
    for path in Path(tempfile.gettempdir()).glob(f"{atomic.TEMPORARY}*"):
        with suppress(FileNotFoundError):
            if path.lstat().st_uid == os.getuid():
                yield path


def _dispose(place: Path, unused: bool, days: float, dry_run: bool) -> Item:
    size = _size(place)
    if not unused:
        return Item(str(place), size, "in use")
    folders = [place, *(Path(folder) for folder, _, _ in os.walk(place))]  # `place` too: raises if it is gone
    age = (time.time() - max(folder.stat().st_mtime for folder in folders)) / _DAY
    if age < days:
        return Item(str(place), size, f"{age:.1f} days old")
    if not dry_run:
        shutil.rmtree(place)
    return Item(str(place), size)


@contextmanager
def _unused(path: Path, lock: int = fcntl.LOCK_EX) -> Iterator[bool]:
    """Whether nobody holds a lock on the file or directory; meanwhile nobody can get one.

    lock: LOCK_SH to look for an exclusive lock, so that two concurrent checks do not take each other for its holder.
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
    """Clean DVC's cache, except while a stage runs: what that has read or written is not in dvc.lock yet."""
    if busy := running():
        return Item("DVC's cache", 0, f"{busy} works here")
    where = processes.output_of([sys.executable, "-m", "dvc", "cache", "dir"], "DVC's cache")
    before = _size(Path(where))
    named = ["--workspace", "--all-commits", "--all-experiments", "--skip-failed"]  # some old dvc.yaml may not parse
    named += ["--projects", str(WORKSPACE)] if WORKSPACE.is_dir() else []
    command = [sys.executable, "-m", "dvc", "gc", *named, "--force"]
    if dry_run:
        return Item(where, before, processes.output_of([*command, "--dry"], "DVC's cache").splitlines()[-1])
    processes.output_of(command, "DVC's cache")
    return Item(f"{where} (unused objects)", before - _size(Path(where)))


def _size(path: Path) -> int:
    """Bytes of all files below `path`. Files may disappear meanwhile: os.walk, unlike rglob, skips those."""
    total = 0
    for folder, _, files in os.walk(path):
        for file in files:
            with suppress(FileNotFoundError):
                total += Path(folder, file).lstat().st_size
    return total


# --- databases ----------------------------------------------------------------


def theirs() -> dict[str, str]:
    """Databases that the operator backs up and upgrades, not we: the file that each replaces → how, in one line."""
    told = "{} names what is yours to back up and to upgrade: {}"
    found = {}
    if not _mlflow().startswith("sqlite:///"):
        found["mlflow.db"] = told.format("MLFLOW_TRACKING_URI", "pg_dump, `mlflow db upgrade URI`")
    variable, url = _prefect()
    if not url.startswith("sqlite"):
        found["prefect.db"] = told.format(variable, "pg_dump, `prefect server database upgrade`")
    return found


def databases() -> dict[str, Path]:
    """The SQLite files of MLflow and of the local Prefect server that exist and are in use."""
    files = {"mlflow.db": _mlflow(), "prefect.db": _prefect()[1]}
    found = {name: Path(url.partition(":///")[2].partition("?")[0]) for name, url in files.items()}
    return {name: path for name, path in found.items() if name not in theirs() and path.is_file()}


def _mlflow() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def _prefect() -> tuple[str, str]:
    """The environment variable that names the Prefect server's database, if one does, and the database's URL. If it is
    not SQLite, the URL may be its beginning only."""

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
    """Copy the databases to a new folder named by the time (UTC). Each copy is consistent, even while others write.

    Uses SQLite's online backup: a copy of the file would miss what is still in its log, or contain a torn page.

    Raises:
        UserError: if there is no database, or one is damaged.
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
    """Migrate the databases to the schema of the installed MLflow and Prefect; return the backups, and the migrated.

    Raises:
        UserError: if something is running, or an upgrade fails; it names the backup to restore.
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
        processes.output_of(command, f"{path}: not upgraded; the backup is {saved[0].parent}")
    return saved, list(found.values())
