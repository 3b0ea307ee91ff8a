"""Commands that maintain the installation and the files that other commands leave behind."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from memgpt.cli.base import AsJson, show

PANEL = "Upkeep"

app = typer.Typer()


@app.command(rich_help_panel=PANEL)
def doctor(as_json: AsJson = False) -> None:
    """Check the installation, this checkout and what runs in it; every finding names its fix. Changes nothing.

    Exit status 1 if something is broken. Example: [bold]memgpt doctor[/]
    """
    from memgpt import doctor as checks

    found = checks.examine()
    show([dataclasses.asdict(finding) for finding in found] if as_json else checks.lines(found))
    if any(finding.state == "broken" for finding in found):
        sys.exit(1)


@app.command(rich_help_panel=PANEL)
def gc(
    days: Annotated[float, typer.Option(help="Keep checkpoints, worktrees and copies that are younger.", min=0)] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go.")] = False,
) -> None:
    """Remove old checkpoints, worktrees and copies of versions that nothing uses, and unused objects of DVC's cache.

    Safe while stages run. Example: [bold]memgpt gc --dry-run[/]
    """
    from rich.console import Console

    from memgpt import housekeeping

    freed = 0
    with Console(stderr=True).status("DVC reads every commit"):
        for item in housekeeping.gc(days, dry_run):
            freed += 0 if item.kept else item.bytes
            word = f"kept, {item.kept}" if item.kept else "would go" if dry_run else "removed"
            print(f"{item.what}: {item.bytes / 1e6:.1f} MB, {word}", flush=True)
    print(f"gc: {freed / 1e6:.1f} MB {'to free' if dry_run else 'freed'}")


@app.command(rich_help_panel=PANEL)
def backup(directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where: a new folder in it.")]) -> None:
    """Copy mlflow.db and Prefect's database; each copy is consistent even while servers and runs write.

    To restore, stop what uses the database and copy its file back. Example: [bold]memgpt backup .memgpt/backups[/]
    """
    from memgpt import housekeeping

    for path in housekeeping.backup(directory):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    for line in housekeeping.theirs().values():
        print(f"note: {line}")


@app.command(rich_help_panel=PANEL)
def upgrade() -> None:
    """Back up mlflow.db and Prefect's database and migrate them to the installed versions' schema. Stop servers first.

    Example: [bold]memgpt upgrade[/]
    """
    from memgpt import housekeeping

    saved, upgraded = housekeeping.upgrade()
    print(f"backup in {saved[0].parent}; upgraded: {', '.join(map(str, upgraded))}")
    for line in housekeeping.theirs().values():
        print(f"note: {line}")
