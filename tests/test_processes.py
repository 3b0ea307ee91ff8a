"""Children end with their parent, whatever ends it, and take along what they started."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from memgpt import processes
from memgpt.errors import UserError
from memgpt.processes import Children, Stopped

# A command that starts another one, as dvc starts a stage; both write their ids, and the inner one ignores SIGTERM.
NESTED = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN) if "stubborn" in sys.argv else None
if "inner" not in sys.argv:
    subprocess.Popen([sys.executable, __file__, "inner", *sys.argv[1:]])
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def nested(tmp_path: Path) -> str:
    (tmp_path / "nested.py").write_text(NESTED)
    return str(tmp_path / "nested.py")


def alive(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path("/proc").is_dir() else not os.kill(pid, 0)
        )
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: list[int], within: float) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not any(map(alive, pids)):
            return True
        time.sleep(0.05)
    return False


def test_lines_come_as_they_are_written_and_the_status_is_the_commands() -> None:
    lines: list[str] = []
    script = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)"
    assert Children().run([sys.executable, "-u", "-c", script], dict(os.environ), lines.append) == 3
    assert lines == ["one", "two"]


def test_a_bar_that_draws_over_itself_is_many_lines() -> None:
    lines: list[str] = []
    Children().run([sys.executable, "-c", r"print('1 %\r2 %\r', end='')"], dict(os.environ), lines.append)
    assert lines == ["1 %", "2 %"]


def test_a_command_that_a_signal_ended_has_its_status() -> None:
    script = "import os; os.kill(os.getpid(), 9)"
    assert Children().run([sys.executable, "-c", script], dict(os.environ), print) == 128 + signal.SIGKILL


def test_a_command_that_is_not_there_is_named() -> None:
    lines: list[str] = []
    assert Children().run(["/no/such/command"], dict(os.environ), lines.append) == 127
    assert lines == ["error: command: No such file or directory"]


@pytest.mark.parametrize(
    ("script", "named", "told"),
    [
        ("sys.exit(3)", [], "COMMAND: status 3"),
        ("print('on'); sys.exit('one\\nlast')", [], "COMMAND: last"),
        ("sys.exit('ERROR: why\\n\\nask us')", ["the cache"], "the cache: why"),
        ("sys.exit('fatal: why\\nadvice')", [], "COMMAND: why"),
        ("sys.exit('why')", ["the cache", "look there"], "the cache: why; look there"),
        (None, ["the cache"], "the cache: COMMAND: No such file or directory"),
    ],
)
def test_a_command_that_fails_is_told_in_one_line(script: str | None, named: list[str], told: str) -> None:
    command = ["/no/such/command"] if script is None else [sys.executable, "-c", f"import sys; {script}"]
    with pytest.raises(UserError) as caught:
        processes.output_of(command, *named)
    assert str(caught.value).replace(" ".join(command), "COMMAND") == told
    assert processes.output_of([sys.executable, "-c", "print(' fine ')"]) == "fine"


@pytest.mark.parametrize("manner", ["willing", "stubborn"])
def test_stop_ends_the_whole_group(nested: str, manner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    children, lines, outcome = Children(), list[str](), list[object]()

    def work() -> None:
        try:
            children.run([sys.executable, nested, manner], dict(os.environ), lines.append)
        except Stopped as stopped:
            outcome.append(stopped)

    thread = threading.Thread(target=work)
    thread.start()
    while len(lines) < 2:
        time.sleep(0.02)
    children.stop()
    thread.join(10)
    assert len(outcome) == 1
    assert gone([int(line) for line in lines], 1)
    with pytest.raises(Stopped):
        children.run(["true"], dict(os.environ), print)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_parent(nested: str, end: signal.Signals) -> None:
    script = (
        "import os, sys; from memgpt.processes import Children; tell = lambda line: print(line, flush=True); "
        f"Children().run([sys.executable, {nested!r}, 'stubborn'], dict(os.environ), tell)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    parent.send_signal(end)
    parent.wait(10)
    parent.stdout.close()
    assert gone(pids, processes.GRACE + 3)
