"""Child processes that end with their parent: a command and all that it starts, however the parent ends.

Between the parent and the command is a guard, this file run as a script. It starts the command in a process group of
its own, and reads the pipe on its standard input, to which nobody writes. The pipe ends when the parent wants the
command stopped or is gone (kill -9 included); then the guard ends the whole group. `dvc repro` needs this: if killed,
it leaves the stage's command running, which would then write into the outputs of the next run.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

GRACE = 5.0  # seconds from SIGTERM to SIGKILL


class Stopped(Exception):
    """A command was ended by `stop`, or requested after it."""


def start(
    command: Sequence[str], env: Mapping[str, str] | None = None, output: int | IO[bytes] = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    """Start `command` under a guard, which exits with its status (128 + n for signal n); closing stdin ends both."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *command],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=env,
        process_group=0,  # Ctrl-C in the terminal reaches only the parent, which then decides
    )


def output_of(command: Sequence[str], what: str | None = None, fix: str = "") -> str:
    """Run a command without showing its output, and return its standard output.

    Raises:
        UserError: if it fails or does not exist. The message has `what` it was for (else the command), its error line
            (else its last line), and the `fix`.
    """
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
        lines = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()
        named = (line.partition(": ")[2] for line in lines if line.startswith(("ERROR: ", "fatal: ")))  # of DVC and git
        told = next(named, lines[-1])
    except OSError as error:
        told = f"{command[0]}: {error.strerror}"
    from memgpt.errors import UserError  # here, since the guard runs this file without the package

    raise UserError("; ".join(filter(None, (f"{what or ' '.join(command)}: {told}", fix))))


class Children:
    """Runs commands, from any thread; `stop` ends all that are running and refuses more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, command: Sequence[str], env: Mapping[str, str], on_line: Callable[[str], None]) -> int:
        """Run to the end; each line of output, and each update of a progress bar, is passed to `on_line` as it comes.

        Raises:
            Stopped: if `stop` was called before, or while it ran.
        """
        with self._lock:
            if self._stopped:
                raise Stopped
            guard = start(command, env)
            self._running.add(guard)
        try:
            assert guard.stdout is not None
            for raw in guard.stdout:
                for line in raw.decode("utf-8", errors="replace").replace("\r", "\n").split("\n"):
                    if line.strip():
                        on_line(line.rstrip())
            status = guard.wait()
        finally:
            with self._lock:
                self._running.discard(guard)
            end(guard)
        if self._stopped:
            raise Stopped
        return status

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for guard in running:
            _hang_up(guard)
        for guard in running:
            end(guard)


def end(guard: subprocess.Popen[bytes]) -> None:
    """End a guard's group and wait until it is gone; does nothing if it has already ended."""
    _hang_up(guard)
    try:
        guard.wait(GRACE + 5)
    except subprocess.TimeoutExpired:
        guard.kill()
        guard.wait()


def _hang_up(guard: subprocess.Popen[bytes]) -> None:
    assert guard.stdin is not None
    with suppress(OSError):
        guard.stdin.close()


def _guard(command: list[str]) -> int:
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, lambda *_: None)  # a handler, unlike SIG_IGN, is not inherited by the command
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    ending = threading.Thread(target=_end_with_stdin, args=(child.pid,), daemon=True)
    ending.start()
    status = child.wait()
    if not _exists(child.pid):
        return status if status >= 0 else 128 - status
    with suppress(ProcessLookupError):  # the command has ended, but not all that it started
        os.killpg(child.pid, signal.SIGTERM)
    _kill_after_grace(child.pid)
    return status if status >= 0 else 128 - status


def _end_with_stdin(group: int) -> None:
    while os.read(0, 4096):
        pass
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)
        _kill_after_grace(group)


def _kill_after_grace(group: int) -> None:
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        if not _exists(group):
            return
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    try:
        sys.exit(_guard(sys.argv[1:]))
    except OSError as error:
        print(f"error: {Path(sys.argv[1]).name}: {error.strerror}", file=sys.stderr)
        sys.exit(127)
