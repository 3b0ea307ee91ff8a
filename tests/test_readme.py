"""The README's commands work, in its order, on a pipeline that has run; it names what there is, and no more.

A fence behind `<!-- not run: reason -->` is not run.
"""

import os
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Pipeline

from memgpt import config, registry

STAGES_PER_RUN = 18
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"(?P<skip><!-- not run: [^>]+ -->\n)?```(?P<kind>sh|python)\n(?P<text>.*?)```", re.DOTALL)


def fences(kind: str) -> list[str]:
    return [found["text"] for found in FENCE.finditer(README) if found["kind"] == kind and not found["skip"]]


def commands() -> list[str]:
    lines = "".join(fences("sh")).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def walked(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return pipeline.copy(tmp_path_factory.mktemp("readme") / "checkout", registry=True)


def test_the_readme_is_short_and_says_what_this_is() -> None:
    assert len(README.splitlines()) <= 200
    assert "not the agent framework" in " ".join(README.split())


def test_every_command_is_shown() -> None:
    assert len(commands()) >= 12
    assert {command.split()[0] for command in commands()} == {"memgpt", "dvc"}


def champions(place: Pipeline) -> dict[str, str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{place.root / 'mlflow.db'}")
    return {model: registry.aliases(client, model)[registry.CHAMPION] for model in config.MODELS}


def test_run_again_unchanged_stages_are_skipped(walked: Pipeline) -> None:
    before = champions(walked)
    assert commands()[0] == "memgpt retrain"
    done = walked.run("memgpt", "retrain", timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("skipped (unchanged)") == STAGES_PER_RUN
    table = [line.split()[0] for line in done.stdout.splitlines() if " unchanged " in line and line[0] != " "]
    assert sorted(table) == sorted(config.MODELS)
    assert "models:/memgpt-ner@champion" in done.stdout
    assert champions(walked) == before


def test_the_other_commands_work_in_order(walked: Pipeline) -> None:
    for command in commands()[1:]:
        done = walked.run("/bin/sh", "-c", command, timeout=1500)
        told = f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in told
        # the gate may reject what tiny training gives
        rejected = command.startswith("memgpt retrain") and "is rejected" in done.stderr
        assert done.returncode == 0 or rejected, told


@pytest.mark.parametrize("number", range(len(fences("python"))))
def test_the_python_works(pipeline: Pipeline, number: int) -> None:
    done = pipeline.run(sys.executable, "-c", fences("python")[number])
    assert done.returncode == 0, done.stderr


def test_the_file_tree_is_complete() -> None:
    tree = README.partition("## Files")[2].partition("## Limits")[0]
    modules = [path for path in (ROOT / "memgpt").iterdir() if not path.name.startswith("_")]
    for path in [*modules, *(ROOT / "flows").glob("[a-z]*.py"), *(ROOT / "infra").iterdir()]:
        assert path.name in tree or path.name == "py.typed", f"the file tree lacks {path.relative_to(ROOT)}"
    for name in re.findall(r"\b[a-z_]+\.(?:py|sh|yaml|toml|lock|md)\b(?!\.)", tree):
        found = [path for folder in (".", "flows", "memgpt", "infra", "docs") for path in (ROOT / folder).glob(name)]
        assert found or list((ROOT / "memgpt").rglob(name)), f"the file tree names {name}, which is not there"


def test_what_the_text_names_exists() -> None:
    folders = tuple(f"{folder}/" for folder in ("memgpt", "flows", "data", "docs", "infra", "tests", "benchmarks"))
    for name in re.findall(r"`([\w./-]+)`", README):
        if name.startswith(folders) and not name.startswith(("data/sources", "data/tables")):
            assert (ROOT / name).exists(), f"README names {name}"


def test_targets_of_make_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)|`make (\w+)`", README, re.MULTILINE):
        target = "".join(target)
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_scripts_are_executable() -> None:
    for script in [ROOT / ".ci" / "run", *Path(ROOT / "infra").glob("*.sh")]:
        assert os.access(script, os.X_OK), f"{script} is not executable"
        assert "set -euo pipefail" in script.read_text()


def test_the_python_of_the_docs_works(pipeline: Pipeline) -> None:
    text = (ROOT / "docs/core.md").read_text(encoding="utf-8")
    code = "\n".join(found["text"] for found in FENCE.finditer(text) if found["kind"] == "python")
    done = pipeline.run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
