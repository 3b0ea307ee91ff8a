"""The command that runs the whole pipeline as a Prefect flow."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from memgpt.cli.base import REPLACE
from memgpt.errors import UserError

PANEL = "Flows"

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def retrain(
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change params.yaml first, comments kept; may be repeated."),
    ] = None,
    force: Annotated[bool, typer.Option(help="Run every stage, unchanged ones too.")] = False,
    replace: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help=f"{REPLACE} May be repeated."),
    ] = None,
    ask: Annotated[bool, typer.Option(help="Hold what the gate would promote, until `memgpt approve`.")] = False,
) -> None:
    """Run the whole pipeline: snapshot, the stages that changed, and promotion. Watch it in the Prefect UI.

    Example: [bold]memgpt retrain --set finetune.ner.epochs=2[/]
    """
    from memgpt import config, housekeeping

    for model in replace or []:
        if model not in config.MODELS:
            raise UserError(f"--replace {model}: no such model; one of {', '.join(config.MODELS)}")
    if assignments:
        if busy := housekeeping.works_in(Path()):
            raise UserError(f"{busy} works here, by params.yaml as it is; wait for it, or end it")
        _edit(assignments)
    config.load()  # reports a broken params.yaml in one line, before anything starts
    if not Path("flows/retrain.py").is_file():
        raise UserError("flows/retrain.py: not found; run the command in the root of the checkout")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")  # the flow prints its own progress
    flags = [f"--replace={model}" for model in replace or []]
    flags += [*(["--force"] if force else []), *(["--ask"] if ask else [])]
    sys.stdout.flush()
    # The flow replaces this process, so that signals, terminal and exit status are its own.
    os.execv(sys.executable, [sys.executable, "-m", "flows.retrain", *flags])


def _edit(assignments: list[str]) -> None:
    """Write the assignments to params.yaml and print what changed."""
    import difflib

    from memgpt import config

    before = config.PARAMS.read_text(encoding="utf-8") if config.PARAMS.exists() else ""
    config.write(config.override(config.read(), assignments))
    after = config.PARAMS.read_text(encoding="utf-8")
    for line in list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[2:]:
        if not line.startswith("@@"):
            print(f"params.yaml {line[0]} {line[1:].strip()}")
