"""The one exception for what a user can mend."""

from pathlib import Path


class UserError(ValueError):
    """A user's mistake: the message is one line that names the key, file or row, and the fix.

    The command line prints the message without a stack trace and exits with 1; a stack trace is for our own bugs.
    """


def existing(path: Path) -> Path:
    """What an earlier stage makes. transformers would look for a missing folder on the hub, by its name.

    Raises:
        UserError: if it is not there.
    """
    if not path.exists():
        raise UserError(f"{path}: not found; run `dvc repro` (or `memgpt retrain`) first")
    return path
