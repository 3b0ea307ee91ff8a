"""Where a version came from and what was made from it, and how to reproduce it from its own records."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from memgpt import atomic, lineage, processes, registry, slots, tracking
from memgpt.config import MODELS
from memgpt.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

WORKTREES = Path(".memgpt/worktrees")
_DIGEST = 7  # characters of a hash that are enough to identify it


def of(client: "MlflowClient", model: str, version: str) -> dict[str, Any]:
    """A version's record of where it came from, with its parents and children among the registered versions.

    Raises:
        UserError: if it has no lineage, or its files are gone from the artifact store.
    """
    tags = registry.lineage_tags(client, model, version)
    story = _story(tags["mlflow_run"], model, version)
    known = [(name, each) for name in MODELS for each in registry.versions(client, name)]
    parent = story["parent"]
    sources = {}
    if lock := _pinned(client, tags["mlflow_run"]).get("data/sources.lock.json"):
        sources = {
            source: {key: entry.get(key) for key in ("uri", "licence")} for source, entry in json.loads(lock).items()
        }
    for source, digest in json.loads(tags.get("data", "{}")).items():
        sources.setdefault(source, {})["sha256"] = digest
    return {
        "version": registry.uri(model, version),
        "aliases": sorted(alias for alias, number in registry.aliases(client, model).items() if number == version),
        "commit": tags["commit"],
        "dirty": tags["dirty"] == "true",
        "flow_run": None if tags["flow_run"] == "none" else tags["flow_run"],
        "mlflow_run": tags["mlflow_run"],
        "weights": tags["weights"],
        "stage": story["stage"],
        "seed": story["seed"],
        "params": story["params"],
        "libraries": story["versions"],
        "inputs": story["inputs"],
        "sources": {name: entry for name, entry in sources.items() if "sha256" in entry},
        "sources_lock": tags["sources_lock"],
        "parent": parent,
        "parent_versions": [_short(name, each) for name, each in known if each.tags.get("weights") == parent],
        "children": [_short(name, each) for name, each in known if each.tags.get("parent") == tags["weights"]],
        "metrics": json.loads(tags["metrics"]),
    }


def descendants(client: "MlflowClient", what: str) -> dict[str, list[str]]:
    """The reverse: the versions made from `what` → how they used it. `what` is the hash of a commit or file (seven
    characters or more), a flow run, or a path in the checkout such as data/tables/ner.

    Raises:
        UserError: if no version was made from it.
    """
    path = Path(what)
    digest = what
    if path.exists():  # a model directory is identified by its weights, as versions are
        digest = lineage.weights_digest(path) if (path / "model.safetensors").exists() else lineage.digest(path)
    found: dict[str, list[str]] = {}
    if len(digest) >= _DIGEST:
        for model in MODELS:
            for version in registry.versions(client, model):
                said = {key: version.tags.get(key, "") for key in ("commit", "flow_run", "weights", "parent", "code")}
                said |= {"sources_lock": version.tags.get("sources_lock", "")}
                said |= {f"data of {name}": value for name, value in json.loads(version.tags.get("data", "{}")).items()}
                if uses := [key for key, value in said.items() if value.startswith(digest)]:
                    found[_short(model, version)] = uses
    if not found:
        raise UserError(
            f"{what}: neither a version (ner@champion, ner/3) nor a commit, hash, flow run or path that one came of"
        )
    return found


def lines(told: dict[str, Any]) -> list[str]:
    """The record from `of` as lines for people."""
    name = told["version"].removeprefix("models:/memgpt-")
    dirty = ", with uncommitted changes" if told["dirty"] else ""
    parent = ", ".join(told["parent_versions"]) or "not registered" if told["parent"] else "none"
    rows = [
        ("version", f"{told['version']} {' '.join('@' + alias for alias in told['aliases'])}".rstrip()),
        ("commit", told["commit"] + dirty),
        ("flow run", told["flow_run"] or "none, by hand"),
        ("MLflow run", told["mlflow_run"]),
        ("weights", told["weights"][:16]),
        ("stage", f"{told['stage']}, seed {told['seed']}"),
        ("parent", f"{parent} {(told['parent'] or '')[:16]}".rstrip()),
        ("children", ", ".join(told["children"]) or "none"),
        *(
            ("data", f"{source} {entry['sha256'][:16]} from {entry.get('uri', 'a source not kept with it')}")
            for source, entry in told["sources"].items()
        ),
        ("libraries", ", ".join(f"{key} {value}" for key, value in told["libraries"].items())),
        ("params", ", ".join(f"{key}={value}" for key, value in sorted(told["params"].items()))),
        ("metrics", ", ".join(f"{key} {value}" for key, value in _main(told["metrics"]).items())),
        ("its data", f"memgpt reproduce {name} --data    exactly these tables, in a worktree of that commit"),
        ("again", f"memgpt reproduce {name}           the version made anew, and whether its metrics match"),
    ]
    return [f"{title:<11} {text}" for title, text in rows]


@dataclass(frozen=True)
class Outcome:
    """The result of a reproduction. match: "identical" (equal weights and metrics), "within the interval" of the
    version's own score, or "differs"; notes: which conditions were not the original ones."""

    match: str
    metrics: dict[str, tuple[Any, Any]]
    worktree: Path
    notes: list[str]


def reproduce(
    client: "MlflowClient", model: str, version: str, hear: Callable[[str], None], *, data_only: bool = False
) -> Outcome:
    """Reproduce a version in a worktree of its commit, with its params.yaml and sources lock and an empty cache. Every
    stage up to its evaluation runs; with data_only, only those up to its tables.

    Raises:
        UserError: if it has no lineage, the commit is unknown here, or a stage fails, with the stage's message.
    """
    tags = registry.lineage_tags(client, model, version)
    notes = ["its commit had uncommitted changes, which are lost"] if tags["dirty"] == "true" else []
    pinned = _pinned(client, tags["mlflow_run"])
    folder = WORKTREES / f"{model}-{version}"
    with tracking.locked(WORKTREES / f"{model}-{version}.lock"):
        add_worktree(folder, tags["commit"])
        for name in registry.PINNED:
            if name in pinned:
                atomic.write_text(folder / name, pinned[name])
            else:
                notes.append(f"{name} was not kept with the version: the commit's is taken")
        if lineage.digest(folder / "data/sources.lock.json") != tags["sources_lock"]:
            notes.append("data/sources.lock.json is not the one that the version learned from")
        story = _story(tags["mlflow_run"], model, version)
        changed = {name: here for name, here in lineage.libraries().items() if story["versions"].get(name) != here}
        notes += [f"{name} is {here}, was {story['versions'].get(name)}" for name, here in changed.items()]
        if data_only:
            learned = json.loads(tags.get("data") or "{}") or json.loads(tags["licence"])
            _dvc(folder, hear, *(f"ingest@{source}" for source in learned))
            return Outcome("", {}, folder, notes)
        _dvc(folder, hear, f"evaluate@{model}")
        report = json.loads((folder / "reports" / "metrics" / f"{model}.json").read_text(encoding="utf-8"))
        before = json.loads(tags["metrics"])
        metrics = {name: (before.get(name), report.get(name)) for name in sorted({*before, *report})}
        same = lineage.weights_digest(folder / "models" / model) == tags["weights"]
        if same and all(old == new for old, new in metrics.values()):
            match = "identical"
        elif before["ci_low"] <= report["value"] <= before["ci_high"]:
            match = "within the interval"
        else:
            match = "differs"
    return Outcome(match, metrics, folder, notes)


def table(made: Outcome) -> Table:
    """The score, and the metrics that differ."""
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("metric", "then", "now"):
        drawn.add_column(column, justify="left" if column == "metric" else "right")
    for name, (then, now) in made.metrics.items():
        if then != now or name == "value":
            drawn.add_row(name, str(then), str(now))
    return drawn


def add_worktree(folder: Path, commit: str) -> None:
    """A clean checkout of `commit` in `folder`; replaces what is there.

    Raises:
        UserError: if this repository does not have the commit.
    """
    remove_worktree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    processes.output_of(
        # --force twice: also replaces a worktree that a kill left locked during its creation.
        ["git", "worktree", "add", "--quiet", "--detach", "--force", "--force", str(folder), commit],
        f"commit {commit}",
        "`git fetch` it, or work in the repository it was made in",
    )


def remove_worktree(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "worktree", "prune"], capture_output=True, check=False)


def _dvc(folder: Path, hear: Callable[[str], None], *stages: str) -> None:
    """Run stages, even unchanged ones, in the worktree with its own code, cache and tracking store."""
    said: list[str] = []

    def on_line(line: str) -> None:
        said.append(line)
        hear(line)

    root = folder.resolve()
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("MEMGPT_", "PREFECT_", "MLFLOW_"))}
    if slots.LIMIT in os.environ:
        ours[slots.LIMIT] = os.environ[slots.LIMIT]
    env = {
        **ours,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{ours.get('PATH', '')}",
        "PYTHONPATH": str(root),
        "PYTHONUNBUFFERED": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}",
    }
    command = [sys.executable, "-m", "dvc", "--cd", str(root), "repro", "--force", *stages]
    children = processes.Children()
    try:
        status = children.run(command, env, on_line)
    finally:
        children.stop()
    if status:
        told = [line for line in said if line.startswith(("error: ", "ERROR: "))]
        why = told[0].partition(": ")[2] if told else (said or ["dvc failed"])[-1]
        raise UserError(f"{folder}: {why}")


def _story(run: str, model: str, version: str) -> dict[str, Any]:
    """The version's lineage.json, from its run's artifacts."""
    from mlflow.artifacts import load_text
    from mlflow.exceptions import MlflowException

    try:
        return json.loads(load_text(f"runs:/{run}/model/artifacts/model/{lineage.FILE}"))
    except (MlflowException, OSError):
        registry.intact(model, version)  # raises if the store does not answer; MLflow's download does not tell
        raise UserError(
            f"{registry.uri(model, version)}: its files are gone from the artifact store; restore them from a backup"
        ) from None


def _pinned(client: "MlflowClient", run: str) -> dict[str, str]:
    """The files of registry.PINNED that were stored with a version's run: name → text."""
    from mlflow.artifacts import load_text

    kept = {file.path for file in client.list_artifacts(run, "pinned")}
    return {
        name: load_text(f"runs:/{run}/pinned/{Path(name).name}")
        for name in registry.PINNED
        if f"pinned/{Path(name).name}" in kept
    }


def _short(model: str, version: Any) -> str:
    return f"{model}/{version.version}"


def _main(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: metrics[key] for key in ("primary", "value", "ci_low", "ci_high", "n", "baseline") if key in metrics}
