"""The one exception for errors that a user can fix."""

from pathlib import Path


class UserError(ValueError):
    """A user's mistake. The message is one line that names the key, file or row, and the fix.

    The command line prints it without a stack trace and exits with status 1; stack traces are for our own bugs.
    """


def existing(path: Path) -> Path:
    """`path`, an earlier stage's output, if it exists. transformers would look for a missing folder on the hub.

    Raises:
        UserError: if it is not there.
    """
    if not path.exists():
        raise UserError(f"{path}: not found; run `dvc repro` (or `memgpt retrain`) first")
    return path
