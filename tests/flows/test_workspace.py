"""The folder of deployed runs: put back to a commit, held by one run, and what a killed one leaves in its lock."""

import subprocess
from pathlib import Path

import pytest

from flows import workspace
from memgpt.errors import UserError


def git(*arguments: str) -> str:
    command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.invalid", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a repository with what people write and what runs make, as the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("params.yaml", "code.py", "dvc.lock", "reports/metrics/ner.json"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("committed")
    Path(".gitignore").write_text(".memgpt/\n")
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "start")
    return git("rev-parse", "HEAD")


def test_a_reset_leaves_nothing_over_but_what_runs_make(commit: str) -> None:
    Path("params.yaml").write_text("overridden")
    Path("code.py").unlink()
    Path("stray.py").write_text("left behind")
    git("add", "--all")
    git("commit", "--quiet", "--message", "another")
    Path("dvc.lock").write_text("made")
    Path("reports/metrics/ner.json").write_text("made")
    workspace.reset(Path(), commit)
    assert git("rev-parse", "HEAD") == commit
    assert (Path("params.yaml").read_text(), Path("code.py").read_text()) == ("committed", "committed")
    assert not Path("stray.py").exists()
    assert (Path("dvc.lock").read_text(), Path("reports/metrics/ner.json").read_text()) == ("made", "made")


def test_a_commit_that_is_not_there_is_told(commit: str) -> None:
    with pytest.raises(UserError, match=r"git -C \. reset"):
        workspace.reset(Path(), "0" * 40)


def test_one_run_at_a_time_and_a_killed_one_is_named(commit: str) -> None:
    with workspace.occupied("first") as last:
        assert last == ""
        with pytest.raises(UserError, match="retrain already runs here"), workspace.occupied("second"):
            pass
    with workspace.occupied("third") as last:
        assert last == ""  # the first left it in order
    workspace.RETRAIN.write_text("4711 killed")
    with workspace.occupied(None) as last:
        assert last == "killed"  # for whoever only looks
    with workspace.occupied("fourth") as last:
        assert last == "killed"


def test_it_is_settled_until_something_changes(commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[bool] = [False]
    monkeypatch.setattr(workspace, "_changed", lambda stages: changed[0])
    assert not workspace.settled(["ner"], [])
    workspace.settle(["ner"])
    assert workspace.settled(["ner"], [])
    assert not workspace.settled(["ner", "sentiment"], [])
    changed[0] = True
    assert not workspace.settled(["ner"], [])
    changed[0] = False
    with monkeypatch.context() as patch:  # a registry in which nothing is
        patch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@elsewhere/mlflow")
        assert not workspace.settled(["ner"], [])
    assert workspace.settled(["ner"], [])
    with monkeypatch.context() as patch:
        for uri in (
            "",
            "sqlite:///mlflow.db",
            f"sqlite:///{Path.cwd()}/mlflow.db",
        ):  # the last is the run's
            patch.setenv("MLFLOW_TRACKING_URI", uri)
            assert workspace.settled(["ner"], [])
    Path("params.yaml").write_text("other")
    assert not workspace.settled(["ner"], [])
