"""The model registry: versions with their lineage, aliases, and the record of every decision.

Only `promote` and `rollback` change it. Every change follows one path: `carry_out` records the intent as a run of the
experiment `promotions`, applies it, and marks the run done. What a kill leaves open, `reconcile` settles at the next
start: finished, unless it was to move the champion alias and has not; then abandoned. `apply` may be repeated.
"""

import getpass
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memgpt import card, lineage, packaging, processes, tracking
from memgpt.config import MODELS, SOURCES
from memgpt.errors import UserError, existing

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
CHALLENGER = "challenger"
# The tags that a version must have. `content` is the hash of those in CONTENT: equal content means the same version.
CONTENT = (
    "weights",
    "lineage",
    "code",
    "metrics",
    "sources_lock",
    "source_family",
    "labels",
    "licence",
    "non_commercial",
)
ORIGIN = ("commit", "dirty", "flow_run", "mlflow_run")
REQUIRED = (*CONTENT, "content", *ORIGIN)
PINNED = (
    "params.yaml",
    "data/sources.lock.json",
)  # files stored with a version, since its commit may have others
_LINEAGE = {"stage", "inputs", "params", "parent", "seed", "versions", "metrics"}  # keys of lineage.json
_REPORT = {"primary", "value", "ci_low", "ci_high", "n", "baseline"}
_DESCRIPTION = 4900  # characters: MLflow's column has 5,000, and databases other than SQLite enforce it
_PRODUCTS = (":!dvc.lock", ":!reports", ":!models", ":!data")  # the pipeline's outputs make no commit dirty


def name(model: str) -> str:
    return f"memgpt-{model}"


def uri(model: str, version: str) -> str:
    return f"models:/{name(model)}/{version}"


_REFERENCE = re.compile(r"(?:models:/)?(?:memgpt-)?(?P<model>[a-z]+)(?:[@/](?P<version>[\w.-]+))?")


def parse(text: str) -> tuple[str, str | None]:
    """The model, and the version or alias, that a person names: `ner@champion`, `ner/3`, `memgpt-ner@champion`,
    `models:/memgpt-ner/3`; None for a bare `ner`.

    Raises:
        UserError: if it names no model.
    """
    found = _REFERENCE.fullmatch(text)
    if not found or found["model"] not in MODELS:
        raise UserError(f"{text}: no such model; one of {', '.join(MODELS)}, a version as ner@champion or ner/3")
    return found["model"], found["version"]


def names_version(text: str) -> bool:
    """Whether `text` is a model or a version of one, as `parse` reads it."""
    found = _REFERENCE.fullmatch(text)
    return found is not None and found["model"] in MODELS


def resolve(client: "MlflowClient", text: str) -> tuple[str, str]:
    """The model and the number of the version that `text` names; a bare model means its champion.

    Raises:
        UserError: if there is no such model, alias or version.
    """
    model, wanted = parse(text)
    wanted = wanted or CHAMPION
    if not wanted.isdecimal():
        known = aliases(client, model)
        if wanted not in known:
            fix = f"; `memgpt promote {model}` makes one" if wanted == CHAMPION else ""
            names = ", ".join(sorted(known)) or "none yet"
            raise UserError(f"{model}@{wanted}: {name(model)} has no {wanted}, known aliases: {names}{fix}")
        return model, known[wanted]
    numbers = [str(version.version) for version in versions(client, model)]
    if wanted not in numbers:
        raise UserError(f"{uri(model, wanted)}: no such version; there are {', '.join(numbers) or 'none yet'}")
    return model, wanted


@dataclass(frozen=True)
class Candidate:
    """A finished model directory with all that a version must record, except the run that registers it."""

    model: str
    directory: Path
    report: dict[str, Any]
    sources: dict[str, dict[str, Any]]
    story: dict[str, Any]
    tags: dict[str, str]
    pinned: tuple[Path, ...] = ()

    @property
    def weights(self) -> str:
        return self.tags["weights"]


def candidate(model: str, root: Path = Path()) -> Candidate:
    """models/<model> with its lineage, test report, manifests, lock and commit.

    Raises:
        UserError: naming what is missing: without complete lineage nothing is registered.
    """
    directory = existing(root / "models" / model)
    story = lineage.read(directory)
    _complete(directory / lineage.FILE, story, _LINEAGE)
    report = _json(root / "reports" / "metrics" / f"{model}.json", f"memgpt evaluate {model}")
    _complete(root / "reports" / "metrics" / f"{model}.json", report, _REPORT)
    own = "corpus" if model == "base" else model
    learned = SOURCES if any("multitask" in path for path in story["inputs"]) else tuple(dict.fromkeys(("corpus", own)))
    sources = {
        source: _json(root / "data" / "tables" / source / "manifest.json", f"memgpt ingest {source}")
        for source in learned
    }
    lock = root / "data" / "sources.lock.json"
    if not lock.is_file():
        raise UserError(f"{lock}: missing; run `memgpt snapshot`")
    commit, dirty = commit_at_start(root)
    licences = {source: manifest["licence"] for source, manifest in sources.items()}
    content = {
        "weights": lineage.weights_digest(directory),
        "lineage": lineage.digest(directory / lineage.FILE),
        "code": packaging.code_digest(),
        "metrics": _compact({key: value for key, value in report.items() if isinstance(value, str | int | float)}),
        "sources_lock": lineage.digest(lock),
        "source_family": _compact(sources[own]["family"]),
        "labels": _compact(sources[own]["labels"]),
        "licence": _compact(licences),
        "non_commercial": _compact(any(manifest["non_commercial"] for manifest in sources.values())),
    }
    origin = {
        "commit": commit,
        "dirty": _compact(dirty),
        "flow_run": os.environ.get("PREFECT__FLOW_RUN_ID") or "none",
    }
    digest = hashlib.sha256(_compact(content).encode()).hexdigest()
    for source, manifest in sources.items():  # the hash at training time, if the lineage has it
        tables = root / "data" / "tables" / source
        manifest["sha256"] = story["inputs"].get(f"data/tables/{source}") or lineage.digest(tables)
    learned_from = {
        "parent": story["parent"] or "none",
        "data": _compact({source: manifest["sha256"] for source, manifest in sources.items()}),
    }
    tags = {**content, "content": digest, **origin, **learned_from}
    pinned = tuple(root / file for file in PINNED if (root / file).is_file())
    return Candidate(model, directory, report, sources, story, tags, pinned)


def commit_at_start(root: Path) -> tuple[str, bool]:
    """HEAD, and whether tracked or new files differ from it, apart from the pipeline's outputs.

    MEMGPT_COMMIT (`<sha>` or `<sha>-dirty`), noted by a flow at its start, takes precedence: HEAD may have moved since.
    """
    noted = os.environ.get("MEMGPT_COMMIT")
    if noted:
        sha, _, rest = noted.partition("-")
        return sha, rest == "dirty"

    def git(*arguments: str) -> str:
        what = f"{root.resolve()}: no commit to name in the lineage"
        return processes.output_of(["git", "-C", str(root), *arguments], what, "work in a git checkout")

    return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", ".", *_PRODUCTS))


def aliases(client: "MlflowClient", model: str) -> dict[str, str]:
    """alias → version; empty if the model is not registered yet."""
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_registered_model(name(model)).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise
    return {alias: str(version) for alias, version in found.items()}  # an int on SQLite, a string over HTTP


def version_tags(client: "MlflowClient", model: str, version: str) -> dict[str, str]:
    return dict(client.get_model_version(name(model), version).tags)


def lineage_tags(
    client: "MlflowClient", model: str, version: str, required: Sequence[str] = REQUIRED
) -> dict[str, str]:
    """A version's tags, which include all `required` ones.

    Raises:
        UserError: if one is missing, as in a version that was not registered by `memgpt promote`.
    """
    tags = version_tags(client, model, version)
    if missing := missing_lineage(tags, required):
        raise UserError(f"{uri(model, version)}: lacks lineage ({', '.join(missing)}); choose another version")
    return tags


def intact(model: str, version: str) -> bool:
    """Whether the version's files are still where the registry says; whether they load is checked by the gate.

    Raises:
        UserError: if the artifact store does not answer (Unreachable), or refuses access.
    """
    from mlflow.artifacts import list_artifacts
    from mlflow.exceptions import MlflowException

    try:
        return any(file.path == "MLmodel" for file in list_artifacts(artifact_uri=uri(model, version)))
    except Exception as error:
        if getattr(error, "response", {}).get("Error", {}).get("Code") == "NoSuchBucket":
            return False
        if told := tracking.as_user_error(error):
            raise told from None
        if isinstance(error, MlflowException | OSError):
            return False
        raise


def missing_lineage(tags: Mapping[str, str], required: Sequence[str] = REQUIRED) -> list[str]:
    return [key for key in required if not tags.get(key)]


def versions(client: "MlflowClient", model: str) -> "list[ModelVersion]":
    """Every version, newest first."""
    found = client.search_model_versions(f"name = '{name(model)}'", max_results=1000)
    return sorted(found, key=lambda version: int(version.version), reverse=True)


def register(client: "MlflowClient", candidate: Candidate) -> str:
    """Package and register the candidate, and return its version; an existing one with the same content is reused.

    The version is created together with all its tags, so it never exists without lineage.
    """
    if not client.search_registered_models(f"name = '{name(candidate.model)}'"):
        client.create_registered_model(name(candidate.model))
    for version in versions(client, candidate.model):
        same = version.tags.get("content") == candidate.tags["content"] and not missing_lineage(version.tags)
        if same and intact(candidate.model, str(version.version)):
            return str(version.version)
    with tracking.stage_run("register", candidate.model, {"model": str(candidate.directory)}) as run:
        run.metrics({key: value for key, value in candidate.report.items() if isinstance(value, int | float)})
        tags = {**candidate.tags, "mlflow_run": run.id}
        text = card.write(candidate.model, candidate.report, tags, candidate.sources, candidate.story)
        with tempfile.TemporaryDirectory() as folder:
            packaged = Path(folder) / "model"
            packaging.save(candidate.model, candidate.directory, text, packaged, run.id)
            client.log_artifacts(run.id, str(packaged), "model")
        client.log_text(run.id, text, "model_card.md")
        for path in candidate.pinned:
            client.log_artifact(run.id, str(path), "pinned")
    made = client.create_model_version(
        name(candidate.model), f"runs:/{run.id}/model", run.id, tags=tags, description=_description(text)
    )
    return str(made.version)


def _description(text: str) -> str:
    """A card without its front matter, truncated to what the registry's column holds."""
    body = text.split("---\n", 2)[2]
    if len(body) <= _DESCRIPTION:
        return body
    return (
        body[:_DESCRIPTION].rpartition("\n")[0]
        + "\n\n… the rest is in the artifact model_card.md of the version's run."
    )


def challenge(client: "MlflowClient", model: str, version: str) -> None:
    client.set_registered_model_alias(name(model), CHALLENGER, version)


Verdict = Literal["promote", "reject", "hold", "unchanged", "rollback"]


@dataclass(frozen=True)
class Change:
    """A decision to record and apply. before: the champion's version, if any; reason: the one that a person gave."""

    model: str
    verdict: Verdict
    version: str
    before: str | None
    reasons: list[str]
    actor: str
    reason: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


def carry_out(client: "MlflowClient", change: Change) -> str:
    """Record the intent, apply it, mark it done. Returns the id of the run that records it."""
    tags = {
        "state": "intent",
        "model": change.model,
        "verdict": change.verdict,
        "from": change.before or "none",
        "to": change.version,
        "reasons": "; ".join(change.reasons),
        "actor": change.actor,
        "reason": change.reason or "none",
        "flow_run": os.environ.get("PREFECT__FLOW_RUN_ID") or "none",
    }
    title = f"{change.model}: {change.verdict} {change.version}"
    info = client.create_run(tracking.experiment(tracking.PROMOTIONS), run_name=title, tags=tags).info
    tracking.Run(client, info.run_id).metrics(change.numbers)
    apply(client, tags, info.start_time)
    close(client, info.run_id, "done")
    return info.run_id


def apply(client: "MlflowClient", tags: Mapping[str, str], at: int) -> None:
    """Bring the registry to the state that a record asks for; `at`: its time in ms. The champion alias moves first.
    Idempotent: setting what is set and deleting what is gone change nothing."""
    model, verdict, version, before = name(tags["model"]), tags["verdict"], tags["to"], tags["from"]
    when = datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="seconds")
    note = f"{when} by {tags['actor']}: {tags['reasons']}"
    if verdict in ("promote", "rollback"):
        client.set_registered_model_alias(model, CHAMPION, version)
        if before not in ("none", version):
            word = "superseded" if verdict == "promote" else "rolled_back"
            client.set_model_version_tag(model, before, word, f"{when} by {tags['actor']}: version {version}")
        client.set_model_version_tag(model, version, "promoted", note)
        for word in ("rejected", "held", "superseded", "rolled_back"):
            client.delete_model_version_tag(model, version, word)
    elif verdict in ("reject", "hold"):
        client.set_model_version_tag(model, version, "rejected" if verdict == "reject" else "held", note)
        client.delete_model_version_tag(model, version, "held" if verdict == "reject" else "rejected")
    if verdict in ("promote", "reject") and aliases(client, tags["model"]).get(CHALLENGER) == version:
        client.delete_registered_model_alias(model, CHALLENGER)


def close(client: "MlflowClient", run_id: str, state: str) -> None:
    client.set_tag(run_id, "state", state)
    client.set_terminated(run_id, "FINISHED" if state == "done" else "KILLED")


def records(client: "MlflowClient", model: str) -> "list[Run]":
    """Every decision on a model, newest first."""
    if client.get_experiment_by_name(tracking.PROMOTIONS) is None:
        return []  # reading does not create the experiment
    found, token = [], None
    while token != "":
        page = client.search_runs(
            [tracking.experiment(tracking.PROMOTIONS)], f"tags.model = '{model}'", page_token=token
        )
        found += page
        token = page.token or ""
    return found


def reconcile(client: "MlflowClient", model: str) -> list[str]:
    """Finish or abandon the decisions on this model that a killed process left open; returns a line for each."""
    query = f"tags.state = 'intent' and tags.model = '{model}'"
    settled = []
    for run in client.search_runs([tracking.experiment(tracking.PROMOTIONS)], query, order_by=["start_time ASC"]):
        tags = run.data.tags
        moves = tags["verdict"] in ("promote", "rollback")
        if moves and aliases(client, model).get(CHAMPION) != tags["to"]:
            close(client, run.info.run_id, "abandoned")
            settled.append(f"{model}: abandoned an unfinished {tags['verdict']} of version {tags['to']}")
        else:
            apply(client, tags, run.info.start_time)
            close(client, run.info.run_id, "done")
            settled.append(f"{model}: finished an unfinished {tags['verdict']} of version {tags['to']}")
    return settled


def actor() -> str:
    """Who decides if nobody is named: MEMGPT_ACTOR, else the flow run, else the system user."""
    named = os.environ.get("MEMGPT_ACTOR")
    flow = os.environ.get("PREFECT__FLOW_RUN_ID")
    if named or flow:
        return named or f"flow run {flow}"
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"uid {os.getuid()}"


def _json(path: Path, made_by: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run `{made_by}`") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at line {error.lineno}; run `{made_by}` again") from None


def _complete(path: Path, value: dict[str, Any], required: set[str]) -> None:
    missing = sorted(required - value.keys())
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; without whole lineage nothing is registered")


def _compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
