"""Only so many trainings at once, between processes that know nothing of one another, whichever way one ends."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, clean_environment

from memgpt import slots
from memgpt.errors import UserError

HOLD = """
import sys
from memgpt import slots
with slots.slot(sys.argv[1], 1):
    print("in", flush=True)
    sys.stdin.read()
"""
# What a training may leave behind: a child that was forked, and one that was started.
PARENT = """
import os, subprocess, sys, time
from memgpt import slots
with slots.slot("finetune ner", 1):
    children = [os.fork() or time.sleep(60), subprocess.Popen(["sleep", "60"]).pid]
    print(*children, flush=True)
    time.sleep(60)
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a script; slots of this test's own, its processes gone at the end."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(slots.LIMIT, raising=False)
    started = []

    def run(script: str, *words: str, **variables: str) -> subprocess.Popen[str]:
        env = {**clean_environment(), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), **variables}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, "-c", script, *words], env=env, text=True, **pipes))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_one_waits_says_for_whom_and_goes_on(start: Start) -> None:
    first = start(HOLD, "finetune ner")
    assert first.stdout.readline() == "in\n"
    second = start(HOLD, "pretrain")
    line = second.stderr.readline()
    assert line == f"pretrain: waiting for one of 1 slots: taken by process {first.pid} (finetune ner)\n"
    first.communicate("")
    assert second.stdout.readline() == "in\n"


def test_the_environment_gives_more_room(start: Start) -> None:
    holders = [start(HOLD, "pretrain", MEMGPT_SLOTS="2") for _ in range(2)]
    assert [holder.stdout.readline() for holder in holders] == ["in\n", "in\n"]
    line = start(HOLD, "multitask", MEMGPT_SLOTS="2").stderr.readline()
    assert all(f"process {holder.pid} (pretrain)" in line for holder in holders)
    unlimited = start(HOLD, "finetune ner", MEMGPT_SLOTS="0")
    assert unlimited.stdout.readline() == "in\n"


@pytest.mark.parametrize("command", ["pretrain", "multitask", "finetune ner"])
def test_trainings_wait(start: Start, tmp_path: Path, command: str) -> None:
    """Before they read, write or log anything."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    assert start(HOLD, "another").stdout.readline() == "in\n"
    script = f"import os; os.chdir({str(tmp_path)!r}); from memgpt.cli import main; main()"
    training = start(script, *command.split(), MEMGPT_SLOTS="1")
    assert "waiting for one of 1 slots" in training.stderr.readline()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memgpt", "params.yaml"]


def test_a_killed_holder_frees_its_slot_though_its_children_live(start: Start) -> None:
    holder = start(PARENT)
    children = [int(word) for word in holder.stdout.readline().split()]
    waiting = start(HOLD, "pretrain")
    assert f"process {holder.pid} (finetune ner)" in waiting.stderr.readline()
    holder.kill()
    holder.wait()
    try:
        assert waiting.stdout.readline() == "in\n"
        for child in children:
            os.kill(child, 0)  # still there
    finally:
        for child in children:
            os.kill(child, 9)


def test_a_wrong_number_is_told(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(slots.LIMIT, "two")
    with pytest.raises(UserError, match="MEMGPT_SLOTS=two: not a number"), slots.slot("pretrain", None):
        pass
