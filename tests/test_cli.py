"""The command line teaches itself, checks what it is given, and tells a user's mistake in one line."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from conftest import ROOT, clean_environment
from ruamel.yaml import YAML
from typer.testing import CliRunner

from memgpt import cli, config, environment
from memgpt.errors import UserError

STAGES = ["snapshot", "ingest", "validate", "tokenize", "pretrain", "multitask", "finetune", "evaluate"]
COMMANDS = [
    *STAGES,
    "convert",
    "tune",
    "index",
    "score",
    "monitor",
    "retrain",
    "promote",
    "approve",
    "rollback",
    "verify",
    "history",
    "lineage",
    "compare",
    "reproduce",
    "predict",
    "explain",
    "suggest-labels",
    "pseudo-label",
    "usage",
    "ui",
    "doctor",
    "gc",
    "backup",
    "upgrade",
]


def memgpt(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "memgpt.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=clean_environment(), capture_output=True, text=True, check=False)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the committed params.yaml and nothing else, as working directory."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_shows_every_command_in_its_group() -> None:
    told = memgpt("--help").stdout
    positions = [told.index(f" {name} ") for name in ("Stages", "Flows", "Models", "Registry", "Look", "Upkeep")]
    assert positions == sorted(positions)
    for command in COMMANDS:
        assert f"│ {command} " in told


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example(command: str) -> None:
    told = CliRunner().invoke(cli.app, [command, "--help"])
    assert told.exit_code == 0
    assert f"memgpt {command}" in " ".join(told.output.split("Example:")[1].split())


def test_choices_are_those_of_the_configuration() -> None:
    assert get_args(cli.Source) == config.SOURCES
    assert get_args(cli.Task) == config.TASKS
    assert get_args(cli.Model) == config.MODELS


def test_help_imports_nothing_heavy() -> None:
    script = "import sys\nfrom memgpt import cli\nsys.argv = ['', '--help']\ntry: cli.main()\nexcept SystemExit: pass\n"
    heavy = "{'torch', 'transformers', 'mlflow', 'prefect', 'pandas', 'boto3', 'dvc'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}sys.exit(str({heavy}) if {heavy} else 0)"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["ingest", "news"], ["finetune", "base"], ["evaluate", "multitask"], ["promot"]])
def test_what_is_not_a_choice_is_refused(arguments: list[str]) -> None:
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("finetune.ner.epoch=2", "finetune.ner.epoch: unknown key; did you mean 'epochs'?"),
        ("finetune.ner.epochs=two", "finetune.ner.epochs: input should be a valid integer"),
        ("finetune.nr.epochs=2", "no such section 'finetune.nr'"),
        ("finetune.ner.epochs", "expected key=value"),
    ],
)
def test_a_wrong_assignment_is_one_line_and_changes_nothing(place: Path, assignment: str, told: str) -> None:
    before = (place / "params.yaml").read_bytes()
    done = memgpt("retrain", "--set", "pretrain.tokens=5000", "--set", assignment, cwd=place)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert (place / "params.yaml").read_bytes() == before


def test_a_misspelt_key_in_the_file_is_one_line(place: Path) -> None:
    text = (place / "params.yaml").read_text()
    (place / "params.yaml").write_text(text.replace("vocab_size", "vocabsize"))
    done = memgpt("tokenize", cwd=place)
    assert done.returncode == 1
    assert done.stderr == "error: params.yaml: tokenize.vocabsize: unknown key; did you mean 'vocab_size'?\n"


def test_outside_a_checkout_the_root_is_asked_for(tmp_path: Path) -> None:
    for arguments in (["pretrain"], ["retrain"], ["predict", "ner", "Acme"]):
        done = memgpt(*arguments, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_assignments_edit_the_file_and_the_change_is_printed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (place / "params.yaml").read_text()
    cli.flows._edit(["finetune.ner.epochs=9", "data.ner.uri=sample://newsroom?scale=2"])
    told = capsys.readouterr().out.splitlines()
    after = (place / "params.yaml").read_text()
    changed = [(old, new) for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert len(changed) == 2
    assert after.count("#") == before.count("#")
    assert [line.partition(" ")[0] for line in told] == ["params.yaml"] * 4
    assert "params.yaml + epochs: 9" in "\n".join(told)
    assert YAML(typ="safe", pure=True).load(after)["data"]["ner"]["uri"] == "sample://newsroom?scale=2"
    assert YAML(typ="safe").load(after)["data"]["ner"]["uri"] == "sample://newsroom?scale=2"
    yaml.safe_load(after)  # YAML 1.1, as `dvc exp run -S` reads it


def raised_by_main(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> object:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_a_full_disk_is_one_line_that_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "models/base/model.safetensors")
    told = raised_by_main(monkeypatch, error)
    assert str(told).startswith("error: models/base/model.safetensors: the disk is full; free some space")


@pytest.mark.parametrize("words", ["I/O error: No space left on device (os error 28)", "database or disk is full"])
def test_a_library_may_say_it_in_words(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    assert "the disk is full" in str(raised_by_main(monkeypatch, RuntimeError(words)))


def test_another_os_error_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PermissionError):
        raised_by_main(monkeypatch, PermissionError(errno.EACCES, "denied", "x"))


def test_a_users_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        raised_by_main(monkeypatch, UserError("data/x.csv: missing; fetch it"))
        == "error: data/x.csv: missing; fetch it"
    )


def test_interrupted_exits_with_130(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.stages, "_stage", interrupt)
    assert CliRunner().invoke(cli.app, ["snapshot"]).exit_code == 130


def test_threads_are_set_unless_they_are_given(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMGPT_THREADS", "two")
    with pytest.raises(UserError, match="MEMGPT_THREADS=two: not a number of threads"):
        environment.threads(None)
    monkeypatch.setenv("MEMGPT_THREADS", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    cli.base.compute_with(config.load())
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("MKL_NUM_THREADS")
    cli.base.compute_with(config.load())
    assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"]) == ("3", "3")
    monkeypatch.undo()


def test_ui_says_how_to_open_both(place: Path) -> None:
    told = memgpt("ui", cwd=place).stdout
    assert "Prefect  make up" in told
    assert "MLflow   make up" in told
    assert f"sqlite:///{place}/mlflow.db" in told
    assert f"sqlite:///{place}/mlflow.db" in told
