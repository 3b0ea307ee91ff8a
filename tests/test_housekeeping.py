"""doctor, gc, backup and upgrade: what is in use stays, what is broken is told, what is copied can be used."""

import fcntl
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from judged_place import Place, settle
from typer.testing import CliRunner

from memgpt import atomic, checkpoint, cli, doctor, gate, housekeeping, provenance, registry, tracking
from memgpt.errors import UserError
from memgpt.registry import Change

HOLD = """
import sys
from memgpt import checkpoint
print(checkpoint.directory("pretrain", {}, []), flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, which gc looks into, without other tests' files."""
    (tmp_path / "system").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    return tmp_path / "system"


@pytest.fixture
def place(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    return settle(tmp_path / "root", database, monkeypatch)


@contextmanager
def runs(name: str, pid: int = os.getpid()) -> Iterator[None]:
    """As if `make up` had started it as this process."""
    note = housekeeping.UP / f"{name}.json"
    atomic.write_json(note, {"pid": pid})
    with note.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def state(what: str) -> tuple[str, str, str]:
    [finding] = [finding for finding in doctor.examine() if finding.what == what]
    return finding.state, finding.told, finding.fix


def test_gc_leaves_the_checkpoints_of_a_running_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stage = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert stage.stdout
    place = Path(stage.stdout.readline().strip())
    (place / "weights").write_bytes(bytes(2_000_000))
    abandoned = checkpoint.ROOT / "finetune-abandoned"
    abandoned.mkdir()
    (abandoned / "weights").write_bytes(bytes(1_000_000))

    def gc(*arguments: str) -> str:
        return CliRunner().invoke(cli.app, ["gc", *arguments], catch_exceptions=False).output

    try:
        assert "1.0 MB to free" in gc("--days", "0", "--dry-run")
        assert abandoned.exists()
        assert "0.0 MB freed" in gc()  # young: it may still be resumed
        assert abandoned.exists()
        told = gc("--days", "0")
        assert f"{place}: 2.0 MB, kept, in use" in told
        assert "gc: 1.0 MB freed" in told
        assert not abandoned.exists()
        assert (place / "weights").exists()
    finally:
        stage.send_signal(signal.SIGKILL)
        stage.wait()
    assert "2.0 MB freed" in gc("--days", "0")
    assert not place.exists()


def test_a_discarded_checkpoint_can_be_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        place = checkpoint.directory("pretrain", {}, [])
        assert [item.kept for item in housekeeping.gc(0, False)] == ["in use"]
        checkpoint.discard(place)
        assert list(housekeeping.gc(0, False)) == []


def test_gc_removes_what_a_killed_gate_left_of_a_version(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (temporary / "memgpt-temporary-killed" / "version").mkdir(parents=True)
    (temporary / "memgpt-data").mkdir()  # a person's
    with gate.Version("models:/m/1", tmp_path / "work", threads=1):
        found = list(housekeeping.gc(0, False))
        assert sorted(item.kept for item in found) == ["", "in use"]
        assert len(list(temporary.iterdir())) == 2
    assert [path.name for path in temporary.iterdir()] == ["memgpt-data"]


def test_what_ends_while_gc_looks_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = [root / name for root in (checkpoint.ROOT, provenance.WORKTREES) for name in ("ends", "goes")]
    for place in places:
        place.mkdir(parents=True)
    found = []
    for item in housekeeping.gc(0, False):
        found.append(item.what)
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
    assert found == [str(places[0])]
    with pytest.raises(FileNotFoundError):
        housekeeping._dispose(places[0], True, 0, False)


def test_a_temporary_folder_that_gc_takes_before_it_is_locked_is_made_anew(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mkdtemp, made = tempfile.mkdtemp, []

    def taken(prefix: str) -> str:
        made.append(mkdtemp(prefix=prefix))
        if len(made) == 1:
            list(housekeeping.gc(0, False))
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", taken)
    with atomic.temporary() as folder:
        assert [str(path) for path in temporary.iterdir()] == [str(folder)] == made[1:]
    assert list(temporary.iterdir()) == []


def test_gc_removes_what_no_commit_names_from_the_cache_unless_a_stage_runs(place: Place) -> None:
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--quiet"], check=True)
    for text in ("kept" * 1000, "forgotten" * 1000):
        (place.root / "file").write_text(text, encoding="utf-8")
        subprocess.run([*dvc, "add", "--quiet", "file"], check=True)
        if text.startswith("kept"):
            place.git("add", "file.dvc", ".dvc")
            place.git("commit", "-qm", "kept")
    place.git("checkout", "-q", "--", "file.dvc")
    (place.root / "file").unlink()
    workspace = place.root / housekeeping.WORKSPACE
    place.git("worktree", "add", "-q", "--detach", str(workspace))
    (workspace / "file").write_text("deployed" * 1000, encoding="utf-8")
    for command in (["cache", "dir", "--local", str(place.root / ".dvc/cache")], ["add", "--quiet", "file"]):
        subprocess.run([*dvc, "--cd", str(workspace), *command], check=True)
    holder = {"pid": os.getpid(), "cmd": "dvc repro pretrain"}
    for experiment in ("exps/standalone/tmp1/.dvc/tmp", ""):  # `dvc exp run --temp` works in a folder of its own
        rwlock = place.root / ".dvc/tmp" / experiment / "rwlock"
        rwlock.parent.mkdir(parents=True, exist_ok=True)
        rwlock.write_text(json.dumps({"models/base": {"write": holder}}), encoding="utf-8")
        [item] = housekeeping.gc(0, False)
        assert "dvc repro pretrain" in item.kept
        if experiment:
            rwlock.unlink()
    assert "dvc repro pretrain" in state("runs")[1]
    with pytest.raises(UserError, match="dvc repro pretrain"):
        housekeeping.upgrade()
    rwlock.unlink()
    [item] = housekeeping.gc(0, False)
    assert (item.kept, item.bytes) == ("", len("forgotten" * 1000))
    cached = [path.read_text() for path in (place.root / ".dvc/cache/files").rglob("*") if path.is_file()]
    assert sorted(cached) == ["deployed" * 1000, "kept" * 1000]


def test_a_backup_is_one_moment_of_a_database_that_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tables that every transaction keeps equal, in a log that a plain copy of the file would miss."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    with pytest.raises(UserError, match=r"mlflow\.db: not here"):
        housekeeping.backup(tmp_path / "backups")
    Path(".prefect").mkdir()
    writer = sqlite3.connect(".prefect/prefect.db", check_same_thread=False, timeout=30)
    writer.executescript("PRAGMA journal_mode=WAL; CREATE TABLE a (n); CREATE TABLE b (n);")
    ended, began = threading.Event(), threading.Event()

    def write() -> None:
        while not ended.is_set():
            with writer:
                writer.execute("INSERT INTO a VALUES (?)", ("x" * 2000,))
                writer.execute("INSERT INTO b VALUES (?)", ("x" * 2000,))
            began.set()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        began.wait()
        copies = [housekeeping.backup(tmp_path / "backups")[0] for _ in range(5)]
    finally:
        ended.set()
        thread.join()
        writer.close()
    assert [copy.name for copy in copies] == ["prefect.db"] * 5
    for copy in copies:
        counts = sqlite3.connect(copy).execute("SELECT (SELECT count(*) FROM a), (SELECT count(*) FROM b)").fetchone()
        assert counts[0] == counts[1] > 0


def test_a_restored_registry_knows_its_champion(place: Place) -> None:
    place.model(errors=0.1)
    client = tracking.client()
    registry.register(client, registry.candidate("sentiment"))
    registry.carry_out(client, Change("sentiment", "promote", "1", None, ["first"], "Ada"))
    done = CliRunner().invoke(cli.app, ["backup", "backups"], catch_exceptions=False)
    copy = Path(done.output.partition(": ")[0])
    client.delete_registered_model_alias("memgpt-sentiment", "champion")
    assert state("sentiment")[:2] == ("note", "has no champion")
    shutil.copy(copy, place.root / "mlflow.db")
    assert state("sentiment")[:2] == ("well", "champion is version 1")
    shutil.rmtree(place.root / "mlartifacts")
    assert state("sentiment")[0] == "broken"


def test_no_upgrade_beside_what_make_up_started(place: Place) -> None:
    with runs("mlflow"):
        with pytest.raises(UserError, match=r"what `make up` started runs \(mlflow\); `make down` before"):
            housekeeping.upgrade()
        assert not housekeeping.BACKUPS.exists()
    housekeeping.upgrade()  # the id is used again, by this process


def test_an_upgrade_saves_first_and_a_failed_one_names_the_backup(place: Place) -> None:
    saved, upgraded = housekeeping.upgrade()
    assert [path.name for path in saved] == ["mlflow.db"]
    assert upgraded == [place.root / "mlflow.db"]
    assert registry.aliases(tracking.client(), "ner") == {}
    with sqlite3.connect(place.root / "mlflow.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(UserError, match=r"not upgraded; the backup is \.memgpt/backups/"):
        housekeeping.upgrade()


def test_a_database_of_ones_own_is_neither_upgraded_nor_mistaken_for_the_local_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place.root / ".prefect").mkdir()
    sqlite3.connect(place.root / ".prefect/prefect.db").close()
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql+asyncpg://me:secret@127.0.0.1:9/prefect")
    told = CliRunner().invoke(cli.app, ["upgrade"], catch_exceptions=False).output
    assert "upgraded: mlflow.db" in told.replace(f"{place.root}/", "")
    assert "prefect.db" not in told and "secret" not in told
    assert "PREFECT_API_DATABASE_CONNECTION_URL names what is yours to back up" in told
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{place.root}/other.db?timeout=9")
    sqlite3.connect(place.root / "other.db").close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # as if it were not set
    assert housekeeping.theirs() == {}
    assert housekeeping.databases() == {"mlflow.db": Path("mlflow.db"), "prefect.db": place.root / "other.db"}
    monkeypatch.delenv("PREFECT_API_DATABASE_CONNECTION_URL")
    assert housekeeping.databases()["prefect.db"] == Path(".prefect/prefect.db")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_DRIVER", "postgresql+asyncpg")
    assert "PREFECT_SERVER_DATABASE_DRIVER names" in housekeeping.theirs()["prefect.db"]
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", "postgresql+asyncpg://me:secret@127.0.0.1:9/prefect")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI names what is yours.*; PREFECT_API_DATABASE"):
        housekeeping.upgrade()


def test_doctor_finds_what_is_broken_and_makes_nothing(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(ROOT / "params.yaml", place.root)
    assert [finding.told for finding in doctor.examine() if finding.state == "broken"] == []
    (place.root / "requirements.lock").write_text("numpy==0.1\nno-such-package==1\nnone==1 ; python_version < '3'\n")
    assert "numpy" in state("packages")[1]
    assert "no-such-package is missing" in state("packages")[1]
    assert "none" not in state("packages")[1]
    (place.root / "requirements.lock").unlink()
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert state("prefect")[0] == "broken"
    with runs("worker"), runs("mlflow", pid=2**22 + 1):
        assert (state("worker")[0], state("mlflow")[0]) == ("well", "broken")
    (place.root / "params.yaml").write_text("pretrain: {tokns: 1}\n", encoding="utf-8")
    assert state("checkout")[0] == "broken"
    (place.root / "mlflow.db").write_bytes(b"SQLite format 3\0" + bytes(5000))
    assert state("mlflow.db")[0] == "broken"
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 1

    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert state("registry")[:2] == ("note", "no mlflow.db yet")
    assert list(empty.iterdir()) == []
