"""Replacing a file or folder: what a kill leaves comes back or goes, and nothing of a writer that lives is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memgpt import atomic

# Killed after the old folder was moved away, before the new one took its place.
KILLED = """
import os, signal
from pathlib import Path
from memgpt import atomic
rename = Path.rename
def killed(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
Path.rename = killed
with atomic.replacing("folder") as aside:
    aside.mkdir()
    (aside / "text").write_text("new")
"""


def write(target: str, text: str) -> None:
    with atomic.replacing(target) as aside:
        aside.mkdir()
        (aside / "text").write_text(text)


def hidden() -> list[Path]:
    return list(Path().glob(".*.partial"))


def test_a_kill_between_the_renames_and_a_writer_that_fails_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write("folder", "old")
    assert subprocess.run([sys.executable, "-c", KILLED]).returncode < 0
    assert not Path("folder").exists()
    assert len(hidden()) == 2  # the old and the new
    with pytest.raises(OSError, match="full"), atomic.replacing("folder"):
        raise OSError("disk full")
    assert Path("folder/text").read_text() == "old"
    write("folder", "newer")
    assert Path("folder/text").read_text() == "newer"
    assert hidden() == []


def test_writers_leave_each_other_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with atomic.replacing("ner") as first, atomic.replacing("ner.json") as other:
        first.write_text("first")
        other.write_text("other")
        atomic.write_text("ner", "second")
        assert (first.exists(), other.exists()) == (True, True)
    assert (Path("ner").read_text(), Path("ner.json").read_text()) == ("first", "other")
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for pid in (ended.stdout.strip(), os.getpid()):
        Path(f".ner.{pid}-0123abcd.partial").touch()
    atomic.write_text("ner", "third")
    assert hidden() == [Path(f".ner.{os.getpid()}-0123abcd.partial")]
