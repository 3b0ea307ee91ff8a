"""The checks of `memgpt doctor`: is this installation complete, and is what runs here healthy? Each problem is reported
with its fix. Nothing is changed, created or started."""

import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from memgpt import config, environment, housekeeping, registry, tracking
from memgpt.errors import UserError

_LITTLE, _TOO_LITTLE = 5e9, 0.5e9  # bytes of free disk
State = Literal["well", "note", "broken"]


@dataclass(frozen=True)
class Finding:
    """state "note": it works, but somebody should know."""

    what: str
    state: State
    told: str
    fix: str = ""


def examine() -> list[Finding]:
    """The findings of all checks; a UserError in a check is a finding, and the other checks still run."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _installation,
        _checkout,
        _disk,
        _databases,
        _registry,
        _prefect,
        _services,
        _runs,
    ]
    found: list[Finding] = []
    for check in checks:
        try:
            found += check()
        except UserError as error:
            told, _, fix = str(error).partition("; ")
            found.append(Finding(check.__name__.removeprefix("_"), "broken", told, fix))
    return found


def lines(found: list[Finding]) -> list[str]:
    told = []
    for finding in found:
        told.append(f"{finding.state:<7} {finding.what:<14} {finding.told}")
        if finding.fix:
            told.append(f"{'':<22} → {finding.fix}")
    counts = {state: sum(finding.state == state for finding in found) for state in ("broken", "note", "well")}
    return [*told, f"doctor: {', '.join(f'{count} {state}' for state, count in counts.items())}"]


def _installation() -> Iterator[Finding]:
    yield Finding("python", "well", f"{sys.version.split()[0]}, {environment.threads(None)} cores")
    if not shutil.which("git"):
        yield Finding("git", "broken", "not on the PATH", "install git: lineage names commits")
    lock = Path("requirements.lock")
    if lock.is_file():
        wrong = list(_differing(lock))
        few = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        if any("missing" in each for each in wrong):
            yield Finding("packages", "broken", few, "`make run` installs what requirements.lock says")
        elif wrong:
            yield Finding("packages", "note", few, "`make run` installs what requirements.lock says")
        else:
            yield Finding("packages", "well", "as requirements.lock says")


def _differing(lock: Path) -> Iterator[str]:
    """The packages of the lock that are missing here or have another version."""
    from packaging.requirements import Requirement

    for line in lock.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        text = line.partition("#")[0].partition("--hash")[0].strip()
        if not text or text.startswith("-"):
            continue
        needed = Requirement(text)
        if needed.marker and not needed.marker.evaluate():
            continue
        try:
            here = version(needed.name)
        except PackageNotFoundError:
            yield f"{needed.name} is missing"
            continue
        if not needed.specifier.contains(here.partition("+")[0], prereleases=True):
            yield f"{needed.name} {here} instead of {needed.specifier}"


def _checkout() -> Iterator[Finding]:
    config.load()
    yield Finding("params.yaml", "well", "every key is known")
    commit, dirty = registry.commit_at_start(Path())
    yield Finding("commit", "well", commit[:12] + (", with uncommitted changes" if dirty else ""))
    if not Path("data/sources.lock.json").is_file():
        yield Finding("sources", "note", "data/sources.lock.json: missing", "`memgpt snapshot` makes it")


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(".").free
    state: State = "broken" if free < _TOO_LITTLE else "note" if free < _LITTLE else "well"
    yield Finding("disk", state, f"{free / 1e9:.1f} GB free", "" if state == "well" else "`memgpt gc` frees some")


def _databases() -> Iterator[Finding]:
    for name, path in housekeeping.databases().items():
        try:
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
                told = database.execute("PRAGMA quick_check").fetchone()[0].splitlines()[0]
        except sqlite3.DatabaseError as error:
            told = str(error)
        if told == "ok":
            yield Finding(name, "well", f"whole, {path.stat().st_size / 1e6:.1f} MB")
        else:
            yield Finding(name, "broken", f"{path}: {told}", "copy it back from a backup (`memgpt backup`)")


def _registry() -> Iterator[Finding]:
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        yield Finding("registry", "note", "no mlflow.db yet", "`memgpt retrain` makes it")
        return
    from mlflow.exceptions import MlflowException

    try:
        tracking.use()
        client = tracking.client()
        for model in config.MODELS:
            yield _champion(registry.aliases(client, model).get(registry.CHAMPION), model)
            unsettled = [run for run in registry.records(client, model) if run.data.tags["state"] == "intent"]
            if unsettled:
                yield Finding(model, "note", "a decision was cut short", f"`memgpt promote {model}` settles it")
    except MlflowException as error:
        told = str(error).splitlines()[0]
        fix = "`memgpt upgrade`" if "schema" in told.lower() else "see MLFLOW_TRACKING_URI"
        yield Finding("registry", "broken", told, fix)


def _champion(number: str | None, model: str) -> Finding:
    if number is None:
        return Finding(model, "note", "has no champion", f"`memgpt promote {model}` makes one")
    if not registry.intact(model, number):
        told = f"champion {number}: its files are gone from the artifact store"
        return Finding(model, "broken", told, f"restore them, or `memgpt rollback {model}`")
    return Finding(model, "well", f"champion is version {number}")


def _prefect() -> Iterator[Finding]:
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        yield Finding("prefect", "well", "no server configured: each run has its own")
        return
    if why := tracking.no_server(url):
        fix = "start it, or unset PREFECT_API_URL and `make up`"
        yield Finding("prefect", "broken", f"{tracking.shown(url)}: no server answers ({why})", fix)
    else:
        yield Finding("prefect", "well", f"{tracking.shown(url)} answers")


def _services() -> Iterator[Finding]:
    """What `make up` started. `make down` removes the notes, so a noted process that is gone has died."""
    for noted in sorted(housekeeping.UP.glob("*.json")):
        if process := housekeeping.service(noted.stem):
            yield Finding(noted.stem, "well", f"runs (process {process.pid})")
        else:
            yield Finding(noted.stem, "broken", "was started by `make up` and is gone", "`make up`")


def _runs() -> Iterator[Finding]:
    busy = housekeeping.running()
    yield Finding("runs", "well", f"{busy} works here" if busy else "nothing runs here now")
