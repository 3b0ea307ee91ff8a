"""The one exception for what a user can mend."""


class UserError(ValueError):
    """A user's mistake: the message is one line that names the key, file or row, and the fix.

    The command line prints the message without a stack trace and exits with 1; a stack trace is for our own bugs.
    """
