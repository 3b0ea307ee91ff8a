"""The workspace of deployed runs: a git worktree of the checkout in .memgpt/workspace. It is reset to the deployed
commit before each run, so that nothing is left over and no checkout is touched. It uses the checkout's DVC cache.

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

SETTLED = Path(".memgpt/settled.json")  # the state after the last complete run
# Files that runs write are not reset: they record which outputs belong to which inputs, and DVC checks that anyway.
_PRODUCTS = ("dvc.lock", "data/sources.lock.json", "reports")


def create(checkout: Path, commit: str) -> Path:
    """The workspace of a checkout, with its DVC cache and remotes; created at `commit` if there is none yet."""
    folder = checkout / WORKSPACE
    if not (folder / ".git").exists():
        provenance.add_worktree(folder, commit)
    local = checkout / ".dvc/config.local"  # this machine's remotes and credentials
    atomic.write_text(folder / ".dvc/config.local", local.read_text(encoding="utf-8") if local.exists() else "")
    cache = processes.output_of([sys.executable, "-m", "dvc", "--cd", str(checkout), "cache", "dir"])
    processes.output_of([sys.executable, "-m", "dvc", "--cd", str(folder), "cache", "dir", "--local", cache])
    return folder


def reset(folder: Path, commit: str) -> None:
    """Reset all files to `commit`, except ignored files and those that runs write (`_PRODUCTS`).

    Raises:
        UserError: if the commit is missing.
    """
    kept = [f":!{path}" for path in _PRODUCTS]
    # The caller holds the folder's lock (`occupied`), so an index.lock can only be left from a killed git process.
    (folder / _git(folder, "rev-parse", "--git-path", "index.lock")).unlink(missing_ok=True)
    _git(folder, "reset", "--quiet", "--soft", commit)
    _git(folder, "restore", "--source", commit, "--staged", "--worktree", "--", ".", *kept)
    _git(folder, "clean", "--force", "-d", "--quiet", "--", ".", *kept)


@contextmanager
def occupied(run: str | None, folder: Path = Path()) -> Iterator[str]:
    """Lock a folder for one flow run: one retrain at a time. The system releases the lock when its holder dies.

    Yields the id of the previous run if it was killed while holding the lock, else "".

    Raises:
        UserError: if another retrain is running.
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
    """Mark the run that last held a folder's lock, which is free now, as crashed if the server counts it as running."""
    with get_client(sync_client=True) as client:
        for other in client.read_flow_runs(flow_run_filter=FlowRunFilter(id={"any_": [run]})) if run else []:
            if other.state is None or not other.state.is_final():
                client.set_flow_run_state(other.id, Crashed(message="its process was killed"), force=True)


def settled(tasks: Sequence[str], stages: Sequence[str]) -> bool:
    """Whether the last complete run judged these tasks, and nothing has changed since, so that none of these stages
    would run."""
    try:
        known = json.loads(SETTLED.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return known["state"] == _fingerprint() and set(tasks) <= set(known["tasks"]) and not _changed(stages)


def settle(tasks: Sequence[str]) -> None:
    atomic.write_json(SETTLED, {"state": _fingerprint(), "tasks": sorted(tasks)})


def lasting(name: str, where: str) -> str:
    """Returns an output location of a deployed run after checking that the next reset will not remove it.

    Raises:
        UserError: if it is a relative path, and so in the workspace.
    """
    ours = "://" not in where and not Path(where).is_absolute() and Path(where).parts[:1] != (".memgpt",)  # git-ignored
    if ours and os.environ.get("MEMGPT_DEPLOYED"):
        raise UserError(f"{name}: {where} would be in a folder that runs put back; give an absolute path, or s3://")
    return where


def _fingerprint() -> str:
    """A digest of what determines a run's result: commit, registry address, params, dvc.lock and locked data."""
    digest = hashlib.sha256(_git(Path(), "rev-parse", "HEAD").encode())
    digest.update(console.tracking_uri().encode())  # a new registry is still empty
    for path in (Path("params.yaml"), Path("dvc.lock"), Path("data/sources.lock.json")):
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()


def _changed(stages: Sequence[str]) -> bool:
    command = [sys.executable, "-m", "dvc", "status", "--quiet", *stages]
    return subprocess.run(command, capture_output=True).returncode != 0


def _git(folder: Path, *arguments: str) -> str:
    return processes.output_of(["git", "-C", str(folder), *arguments])
