"""What several test files share; its place also puts tests/ on the import path."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import judged_place
import pytest

ROOT = Path(__file__).parents[1]
TINY = [
    *(f"data.{source}.uri=sample://newsroom?scale=0.05" for source in ("corpus", "ner", "sentiment", "recommendation")),
    "tokenize.vocab_size=500",
    "pretrain.tokens=20000",
    "multitask.steps=4",
    *(f"finetune.{task}.epochs=1" for task in ("ner", "sentiment", "recommendation")),
    "evaluate.bootstrap=50",
    "evaluate.robustness=20",
    "promote.bootstrap=50",
]
# Models this small are no better than a baseline, and the gate says so. What consumers do is tested all the same: the
# versions that it judged become champions by the registry's own path.
CROWN = """
from memgpt import registry, tracking
from memgpt.config import MODELS
tracking.use()
client = tracking.client()
for model in MODELS:
    if registry.CHAMPION not in registry.aliases(client, model):
        version = str(registry.versions(client, model)[0].version)
        registry.carry_out(client, registry.Change(model, "promote", version, None, ["crowned by a test"], "test"))
"""


@dataclass(frozen=True)
class Pipeline:
    """A checkout in which `memgpt retrain` has run once. first: what that printed."""

    root: Path
    env: dict[str, str]
    first: str = ""

    def run(self, *command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command there, whatever its exit status."""
        return subprocess.run(
            command, cwd=self.root, env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )

    def copy(self, target: Path) -> "Pipeline":
        """One to break: results and DVC's cache come along, the registry and the server's state do not."""
        left_out = shutil.ignore_patterns("mlflow.db*", "mlartifacts", ".prefect", ".memgpt", "tmp")
        shutil.copytree(self.root, target, ignore=left_out, symlinks=True)
        return Pipeline(target, self.env)


def clean_environment() -> dict[str, str]:
    """This environment with the tested installation on the PATH, one thread, and no server configured."""
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith(("MEMGPT_", "MLFLOW_", "PREFECT_"))
    }
    return {
        **ours,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{ours.get('PATH', '')}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }


def fresh_checkout(target: Path) -> Path:
    """The checkout's files as git would commit them, committed in a repository of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.invalid"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "start"]):
        subprocess.run([*git, *command], cwd=target, check=True, capture_output=True)
    return target


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """The whole pipeline on tiny data, run once; not to be changed (`copy` it first)."""
    made = Pipeline(fresh_checkout(tmp_path_factory.mktemp("pipeline") / "checkout"), clean_environment())
    assignments = [word for assignment in TINY for word in ("--set", assignment)]
    done = made.run("memgpt", "retrain", *assignments, timeout=600)
    judged = [made.root / ".memgpt" / "verdicts" / f"{name}.json" for name in ("base", "ner", "sentiment")]
    assert all(path.is_file() for path in judged), done.stdout + done.stderr
    crowned = made.run(sys.executable, "-c", CROWN)
    assert crowned.returncode == 0, crowned.stderr
    return Pipeline(made.root, made.env, done.stdout + done.stderr)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty registry's, to be copied."""
    return judged_place.empty_registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture
def place(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> judged_place.Place:
    """A checkout in miniature, as the working directory."""
    return judged_place.settle(tmp_path / "root", database, monkeypatch)
