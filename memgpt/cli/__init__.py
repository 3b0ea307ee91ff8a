"""The command line: one file per group of commands that `memgpt --help` shows.

Slow imports are inside the commands that need them, so that `memgpt --help` answers at once.
"""

import errno
import sys
from pathlib import Path

import typer

from memgpt import environment
from memgpt.cli import flows, look, models, registry, stages, upkeep
from memgpt.cli.base import Model, Source, Task
from memgpt.errors import UserError

__all__ = ["Model", "Source", "Task", "app", "main"]

app = typer.Typer(
    help="MemGPT, the memory-augmented GPT for language tasks, and the pipeline that keeps it fresh. "
    "Run it in the root of the checkout; params.yaml holds every setting.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for group in (stages, flows, models, registry, look, upkeep):  # in the order of the help
    app.add_typer(group.app)


def main() -> None:
    """Entry point. A user error prints one line on stderr and exits with status 1; only a bug shows a stack trace."""
    environment.prepare()
    try:
        app()
    except UserError as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if type(error).__module__.startswith(("mlflow.", "botocore.", "boto3.")):
            from memgpt import tracking

            if told := tracking.as_user_error(error):
                sys.exit(f"error: {told}")
        if not _disk_is_full(error):
            raise
        where = getattr(error, "filename", None) or Path.cwd()
        sys.exit(f"error: {where}: the disk is full; free some space and run the command again")


def _disk_is_full(error: Exception) -> bool:
    """Whether the system's error code says so, or the message of a library that sets no code (safetensors, SQLite)."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in ("No space left on device", "database or disk is full"))
