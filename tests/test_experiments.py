"""What data scientists share: a checkout's results through an S3 remote, and experiments that wait in a queue.

Credentials and the remote's address are in the environment alone.
"""

import json
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import servers
from conftest import ROOT, Pipeline


@pytest.fixture(scope="module")
def clone(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A colleague's: cloned from a copy of the pipeline's checkout whose results were pushed."""
    place = tmp_path_factory.mktemp("experiments")
    with servers.s3("results") as s3:
        first = pipeline.copy(place / "first")
        first = Pipeline(first.root, {**first.env, **s3, "PYTHONPATH": str(ROOT)})
        for command in (
            ["dvc", "remote", "add", "--default", "store", "s3://results/cache"],
            ["dvc", "push"],
            ["git", "config", "user.name", "test"],
            ["git", "config", "user.email", "test@example.invalid"],
            ["git", "add", "--all"],
            ["git", "commit", "--quiet", "--message", "results"],
            ["git", "clone", "--quiet", ".", str(place / "clone")],
        ):
            well(first.run(*command))
        assert "test" not in (first.root / ".dvc" / "config").read_text()
        yield Pipeline(place / "clone", first.env)


def well(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_results_are_pulled(clone: Pipeline) -> None:
    well(clone.run("dvc", "pull"))
    assert "up to date" in well(clone.run("dvc", "status"))
    assert (clone.root / "models" / "ner" / "model.safetensors").is_file()


def test_a_queued_experiment_is_run_shown_compared_and_tracked(clone: Pipeline) -> None:
    for key, value in (("user.name", "test"), ("user.email", "test@example.invalid")):
        well(clone.run("git", "config", key, value))
    well(clone.run("dvc", "pull"))
    setting = "finetune.sentiment.learning_rate=0.0005"
    well(clone.run("dvc", "exp", "run", "--queue", "-n", "slower", "-S", setting, "evaluate@sentiment"))
    well(clone.run("dvc", "queue", "start", "--jobs", "1"))
    deadline = time.monotonic() + 600
    while "Success" not in (told := well(clone.run("dvc", "queue", "status"))):
        assert "Failed" not in told, well(clone.run("dvc", "queue", "logs", "slower"))
        assert time.monotonic() < deadline, told
        time.sleep(1)
    shown = json.loads(well(clone.run("dvc", "exp", "show", "--json")))
    assert "slower" in json.dumps(shown)
    changed = json.loads(well(clone.run("dvc", "params", "diff", "HEAD", "slower", "--json")))
    assert changed["params.yaml"]["finetune.sentiment.learning_rate"]["new"] == 0.0005
    metrics = json.loads(well(clone.run("dvc", "metrics", "diff", "HEAD", "slower", "--json", "--all")))
    assert "value" in metrics["reports/metrics/sentiment.json"]
    well(
        clone.run(
            "dvc", "plots", "diff", "HEAD", "slower", "--targets", "reports/plots/sentiment.csv", "--out", "drawn"
        )
    )
    assert "slower" in (clone.root / "drawn" / "index.html").read_text()
    assert well(clone.run("git", "status", "--porcelain", "params.yaml", "dvc.lock")) == ""
    with closing(sqlite3.connect(clone.root / "mlflow.db")) as database:  # not where DVC ran it, which is gone
        tagged = database.execute("SELECT run_uuid FROM tags WHERE key = 'experiment' AND value = 'slower'").fetchall()
        kept = "SELECT value FROM params WHERE key = 'finetune.sentiment.learning_rate'"
        assert database.execute(kept).fetchall() == [("0.0005",)]
    assert len(tagged) == 2  # finetune and evaluate
    well(clone.run("dvc", "queue", "stop"))
