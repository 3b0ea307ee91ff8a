"""Commands for the registry: which version is champion, where it came from, how two versions differ."""

import dataclasses
from typing import Annotated

import typer

from memgpt.cli.base import (
    REPLACE,
    AsJson,
    Model,
    ModelName,
    Reason,
    VersionName,
    compute_with,
    load_config,
    open_registry,
    show,
)
from memgpt.errors import UserError

PANEL = "Registry"

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def promote(
    model: ModelName,
    replace: Annotated[bool, typer.Option(help=REPLACE)] = False,
    ask: Annotated[bool, typer.Option(help="Hold what the gate would promote, until `memgpt approve`.")] = False,
    reason: Reason = "",
) -> None:
    """Register models/MODEL and let the gate decide whether it becomes champion. Exit status 1 if it is rejected.

    Example: [bold]memgpt promote ner[/]
    """
    from memgpt import registry
    from memgpt.stages import promote as stage
    from memgpt.stages import verify as check

    config = load_config()
    verdict = stage.run(config, model, replace=replace, ask=ask, reason=reason)
    print(f"promote {model}: {verdict.verdict} version {verdict.version} ({'; '.join(verdict.reasons)})", flush=True)
    if verdict.verdict == "reject":
        raise UserError(f"memgpt-{model} version {verdict.version} is rejected: {'; '.join(verdict.reasons)}")
    # A version that has just become champion is already known to load.
    if verdict.verdict != "promote" and "champion" in registry.aliases(open_registry(), model):
        check.run(config, model)


@app.command(rich_help_panel=PANEL)
def approve(
    model: ModelName,
    version: Annotated[str | None, typer.Option(help="3 or ner/3. Refuse if another one is held by now.")] = None,
    reject: Annotated[bool, typer.Option("--reject", help="Say no instead.")] = False,
    reason: Reason = "",
) -> None:
    """Approve or reject the version that the gate holds. If approved, it must load and predict to become champion.

    Example: [bold]memgpt approve ner --reason "checked the new tags by hand"[/]
    """
    from memgpt.stages import approve as stage

    done = stage.run(load_config(), model, approve=not reject, version=_number(model, version), reason=reason)
    print(f"approve {model}: version {done.version} {'rejected' if reject else 'is champion'} ({done.reasons})")


@app.command(rich_help_panel=PANEL)
def rollback(
    model: ModelName,
    to: Annotated[str | None, typer.Option(help="3 or ner/3. Default: the champion before this one.")] = None,
    reason: Reason = "",
) -> None:
    """Make an earlier version champion again; it must load and predict first.

    Example: [bold]memgpt rollback sentiment --to 3 --reason "wrong on negations"[/]
    """
    from memgpt.stages import rollback as stage

    done = stage.run(load_config(), model, version=_number(model, to), reason=reason)
    print(f"rollback {model}: version {done.before} → {done.version}")


def _number(model: str, version: str | None) -> str | None:
    """The version number: ner/3 or 3 → 3."""
    from memgpt import registry

    if not version or version.isdecimal():
        return version
    named, number = registry.resolve(open_registry(), version)
    if named != model:
        raise UserError(f"{version}: is no version of {model}")
    return number


@app.command(rich_help_panel=PANEL)
def verify(version: VersionName) -> None:
    """Load a version (by default a model's champion) in a separate process and let it predict.

    Example: [bold]memgpt verify recommendation[/]
    """
    from memgpt.stages import verify as stage

    print(f"verify {version}: version {stage.run(load_config(), version)} loads and predicts")


@app.command(rich_help_panel=PANEL)
def history(
    model: ModelName,
    every: Annotated[bool, typer.Option("--all", help="Rejections, holds and what changed nothing, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show every promotion and rollback of a model, newest first: time, from, to, who, why, numbers.

    Example: [bold]memgpt history ner[/]
    """
    from memgpt import history as past

    entries = past.of(open_registry(), model, every=every)
    show([dataclasses.asdict(entry) for entry in entries] if as_json else past.table(entries))


@app.command(rich_help_panel=PANEL)
def lineage(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="A version; or a commit, flow run, hash or path, to see what came of it."),
    ],
    as_json: AsJson = False,
) -> None:
    """Show where a version came from: commit, data, params, parent, flow run, metrics; and how to restore its data.

    For a commit, flow run, hash or path, show the versions that were made from it.
    Example: [bold]memgpt lineage ner@champion[/], [bold]memgpt lineage data/tables/ner[/]
    """
    from memgpt import provenance, registry

    client = open_registry()
    if registry.names_version(what):
        told = provenance.of(client, *registry.resolve(client, what))
        show(told if as_json else provenance.lines(told))
    else:
        found = provenance.descendants(client, what)
        show(found if as_json else [f"{version:<20} {', '.join(uses)}" for version, uses in found.items()])


@app.command(rich_help_panel=PANEL)
def compare(
    a: Annotated[str, typer.Argument(help="ner@champion, ner/3; ner: models/ner as it is here; an experiment.")],
    b: Annotated[str, typer.Argument(help="The other.")],
    model: Annotated[Model | None, typer.Option(help="Of two experiments.")] = None,
    examples: Annotated[int, typer.Option(help="How many changed answers to show.", min=0)] = 5,
    as_json: AsJson = False,
) -> None:
    """Compare two versions or experiments on the present test set: metrics, paired intervals of b − a, changed answers.

    Example: [bold]memgpt compare ner@champion ner[/], [bold]memgpt compare slower faster --model sentiment[/]
    """
    config = load_config()
    compute_with(config)
    from memgpt import comparison

    found = comparison.compare(config, a, b, model)
    if as_json:
        show(dataclasses.asdict(found))
        return
    show(comparison.table(found, a, b))
    show(["", *comparison.lines(found, examples)])


@app.command(rich_help_panel=PANEL)
def reproduce(
    version: VersionName,
    data: Annotated[bool, typer.Option("--data", help="Only the tables that it learned from.")] = False,
    keep: Annotated[bool, typer.Option(help="Keep the worktree also if the metrics match.")] = False,
) -> None:
    """Train a version again from its commit, params and locked data, and show whether its metrics match.

    Runs in a worktree with an empty cache, below .memgpt/worktrees. Exit status 1 if they do not match.
    Example: [bold]memgpt reproduce ner@champion[/]
    """
    from memgpt import console, provenance, registry

    client = open_registry()
    model, number = registry.resolve(client, version)
    with console.Board() as board:
        title = f"reproduce {model}/{number}"
        board.begin(title)
        made = provenance.reproduce(client, model, number, lambda line: board.note(title, line), data_only=data)
        board.end(title, "done")
    for note in made.notes:
        print(f"note: {note}")
    if data:
        print(f"{made.worktree}/data/tables: the tables of {model}/{number}")
        return
    show(provenance.table(made))
    if made.match == "differs":
        raise UserError(f"{model}/{number}: does not come out again; what was made is in {made.worktree}")
    print(f"{model}/{number}: {made.match}")
    if not keep:
        provenance.remove_worktree(made.worktree)
