"""Where deployed runs happen: a git worktree of the checkout in .memgpt/workspace, put back to the deployed commit
before each run, so that nothing is left over and nobody's checkout is touched. DVC's cache is the checkout's.

    make up     creates it and moves it to the commit that it deploys
    retrain     resets it, then applies the run's overrides to its params.yaml
"""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.states import Crashed

from memgpt import atomic, console, processes, provenance
from memgpt.errors import UserError
from memgpt.housekeeping import RETRAIN, WORKSPACE

SETTLED = Path(".memgpt/settled.json")  # what the last whole run left
# What runs make stays: it says which outputs belong to which inputs, and DVC checks that anyway.
_PRODUCTS = ("dvc.lock", "data/sources.lock.json", "reports")


def create(checkout: Path, commit: str) -> Path:
    """The workspace of a checkout, made at `commit` if there is none yet, with the checkout's DVC cache and remotes."""
    folder = checkout / WORKSPACE
    if not (folder / ".git").exists():
        provenance.add_worktree(folder, commit)
    local = checkout / ".dvc/config.local"  # this machine's remotes and credentials
    atomic.write_text(folder / ".dvc/config.local", local.read_text(encoding="utf-8") if local.exists() else "")
    cache = processes.said([sys.executable, "-m", "dvc", "--cd", str(checkout), "cache", "dir"])
    processes.said([sys.executable, "-m", "dvc", "--cd", str(folder), "cache", "dir", "--local", cache])
    return folder


def reset(folder: Path, commit: str) -> None:
    """Make all that git tracks, but what runs make, as it is in `commit`; ignored files stay.

    Raises:
        UserError: if the commit is not there.
    """
    kept = [f":!{path}" for path in _PRODUCTS]
    # Whoever holds the folder's lock (`occupied`) is alone here: this one was left by a git that was killed.
    (folder / _git(folder, "rev-parse", "--git-path", "index.lock")).unlink(missing_ok=True)
    _git(folder, "reset", "--quiet", "--soft", commit)
    _git(folder, "restore", "--source", commit, "--staged", "--worktree", "--", ".", *kept)
    _git(folder, "clean", "--force", "-d", "--quiet", "--", ".", *kept)


@contextmanager
def occupied(run: str | None, folder: Path = Path()) -> Iterator[str]:
    """Hold a folder for one flow run: one retrain at a time. The system drops the lock when its holder dies.

    Yields the id of the run that held it before us and did not leave it in order, else "".

    Raises:
        UserError: if another one runs.
    """
    (folder / RETRAIN).parent.mkdir(parents=True, exist_ok=True)
    with (folder / RETRAIN).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().partition(" ")[0]
            raise UserError(f"retrain already runs here (process {holder}); wait for it, or end it") from None
        file.seek(0)
        last = file.read().partition(" ")[2]
        if run is None:
            yield last
            return
        _write(file, f"{os.getpid()} {run}")
        try:
            yield last
        finally:
            _write(file, "")


def _write(file: IO[str], text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()


def mark_crashed(run: str) -> None:
    """The run that held a folder's lock last, which is free: if the server takes it for running, it was killed."""
    with get_client(sync_client=True) as client:
        for other in client.read_flow_runs(flow_run_filter=FlowRunFilter(id={"any_": [run]})) if run else []:
            if other.state is None or not other.state.is_final():
                client.set_flow_run_state(other.id, Crashed(message="its process was killed"), force=True)


def settled(tasks: Sequence[str], stages: Sequence[str]) -> bool:
    """Whether these tasks were judged in the last run that was through, and nothing has changed since: none of these
    stages would run."""
    try:
        known = json.loads(SETTLED.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return known["state"] == _fingerprint() and set(tasks) <= set(known["tasks"]) and not _changed(stages)


def settle(tasks: Sequence[str]) -> None:
    atomic.write_json(SETTLED, {"state": _fingerprint(), "tasks": sorted(tasks)})


def lasting(name: str, where: str) -> str:
    """A place to write to, which a deployed run is given, unless the next reset would take it away.

    Raises:
        UserError: for a relative path, which would be in the workspace.
    """
    ours = "://" not in where and not Path(where).is_absolute() and Path(where).parts[:1] != (".memgpt",)  # git-ignored
    if ours and os.environ.get("MEMGPT_DEPLOYED"):
        raise UserError(f"{name}: {where} would be in a folder that runs put back; give an absolute path, or s3://")
    return where


def _fingerprint() -> str:
    """Of what decides on a run's result: commit, params, locked data, what DVC made of them, and which registry."""
    digest = hashlib.sha256(_git(Path(), "rev-parse", "HEAD").encode())
    digest.update(console.tracking_uri().encode())  # a new one has nothing yet
    for path in (Path("params.yaml"), Path("dvc.lock"), Path("data/sources.lock.json")):
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


def _changed(stages: Sequence[str]) -> bool:
    command = [sys.executable, "-m", "dvc", "status", "--quiet", *stages]
    return subprocess.run(command, capture_output=True).returncode != 0


def _git(folder: Path, *arguments: str) -> str:
    return processes.said(["git", "-C", str(folder), *arguments])
