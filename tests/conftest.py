"""What several test files share; its place also puts tests/ on the import path."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import judged_place
import pytest

from memgpt import environment, tracking

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


# Files that take minutes, for xdist to begin with: at the end a core would wait. After the first, which asks for the
# pipeline, come some that do not, to run while it is made.
LONG = (
    "flows/test_up.py",
    *("flows/test_alerts.py", "test_servers.py", "test_distributed.py", "stages/test_promote.py"),
    *("test_readme.py", "flows/test_retrain.py", "flows/test_chaos.py", "test_experiments.py", "test_consumer.py"),
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: much of the time, tests wait for servers."""
    return environment.threads(None) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {ROOT / "tests" / name: rank for rank, name in enumerate(LONG)}
    assert all(path.is_file() for path in ranks)
    items.sort(key=lambda item: ranks.get(item.path, len(LONG)))


@dataclass(frozen=True)
class Pipeline:
    """A checkout in which `memgpt retrain` has run once. first: what that printed."""

    root: Path
    env: dict[str, str]
    first: str = ""

    def run(self, *command: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Run a command there, whatever its exit status."""
        return subprocess.run(
            command, cwd=self.root, env=self.env, capture_output=True, text=True, timeout=timeout, check=False
        )

    def copy(self, target: Path, registry: bool = False) -> "Pipeline":
        """One to change: results and DVC's cache come along, of the server only an empty database.

        registry: with the versions and the champions, else with an empty one too.
        """
        left_out = shutil.ignore_patterns("mlflow.db*", "mlartifacts", ".prefect", ".memgpt", "tmp")
        shutil.copytree(self.root, target, ignore=left_out, symlinks=True)
        judged_place.copy_registry((self.root if registry else self.root.parent) / "mlflow.db", target)
        shutil.copytree(self.root.parent / ".prefect", target / ".prefect")
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
    """The whole pipeline on tiny data, run once for all of xdist's workers; not to be changed (`copy` it first)."""
    base = tmp_path_factory.getbasetemp()  # with xdist, a worker's own in the session's
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pipeline"
    first = place / "first.txt"
    with tracking.locked(place / "lock"):
        if not first.exists():
            shutil.rmtree(place / "checkout", ignore_errors=True)
            judged_place.empty_registry(place)
            empty_server(place / ".prefect")
            first.write_text(run_pipeline(place / "checkout"), encoding="utf-8")
    return Pipeline(place / "checkout", clean_environment(), first.read_text(encoding="utf-8"))


def empty_server(home: Path) -> None:
    """A Prefect server's database to copy: creating one takes seconds."""
    create = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
    subprocess.run(create, env={**clean_environment(), "PREFECT_HOME": str(home)}, check=True, capture_output=True)


def run_pipeline(target: Path) -> str:
    """Make the checkout in which `memgpt retrain` has run, with a champion of every model; what that printed."""
    made = Pipeline(fresh_checkout(target), clean_environment())
    assignments = [word for assignment in TINY for word in ("--set", assignment)]
    done = made.run("memgpt", "retrain", *assignments, timeout=1500)
    judged = [made.root / ".memgpt" / "verdicts" / f"{name}.json" for name in ("base", "ner", "sentiment")]
    assert all(path.is_file() for path in judged), done.stdout + done.stderr
    crowned = made.run(sys.executable, "-c", CROWN)
    assert crowned.returncode == 0, crowned.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty registry's, to be copied."""
    return judged_place.empty_registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture
def place(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> judged_place.Place:
    """A checkout in miniature, as the working directory."""
    return judged_place.settle(tmp_path / "root", database, monkeypatch)
