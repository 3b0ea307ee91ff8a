"""Limits the number of heavy stages that run at once on a machine, over all checkouts of a user.

A slot is a locked file: the system releases the lock when its holder ends, however that happens.
"""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from memgpt import environment
from memgpt.errors import UserError

LIMIT = "MEMGPT_SLOTS"
POLL, REMIND = 0.5, 30.0  # seconds


@contextmanager
def slot(title: str, configured: int | None) -> Iterator[None]:
    """Wait for a slot and hold it; while waiting, print who holds them.

    title: the holder's name, as shown to others. configured: the number of slots, None for no limit; the environment
    variable MEMGPT_SLOTS overrides it, with 0 for no limit.

    Raises:
        UserError: if MEMGPT_SLOTS is not a number.
    """
    limit = _limit(configured)
    if not limit:
        yield
        return
    place = environment.shared_folder("slots")
    place.mkdir(parents=True, exist_ok=True)
    held = _wait(place, limit, title)
    # A child that is forked without exec would keep the lock, so it closes its copy of the file.
    os.register_at_fork(after_in_child=held.close)
    with held:
        yield


def _limit(configured: int | None) -> int | None:
    text = os.environ.get(LIMIT)
    if not text:
        return configured
    if not text.isdecimal():
        raise UserError(f"{LIMIT}={text}: not a number of slots, such as 1; 0 for no limit")
    return int(text)


def _wait(place: Path, limit: int, title: str) -> IO[str]:
    """Wait for a free slot and return its locked file."""
    told, last = "", 0.0
    while True:
        holders = []
        for number in range(limit):
            file = (place / str(number)).open("a+", encoding="utf-8")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    file.seek(0)
                    holders.append(file.read() or "another process")  # empty for the moment of writing
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} ({title})")
            file.flush()
            return file
        text = f"waiting for one of {limit} slots: taken by {', '.join(holders)}"
        # A terminal keeps the line. A log, and the flow's board, which shows a line now and then, get it repeatedly.
        if text != told or (time.monotonic() - last > REMIND and not sys.stderr.isatty()):
            print(f"{title.partition(' ')[0]}: {text}", file=sys.stderr, flush=True)
            told, last = text, time.monotonic()
        time.sleep(POLL)
