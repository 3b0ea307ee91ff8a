"""Everything on servers of one's own, by environment alone: MLflow on PostgreSQL and S3, Prefect on PostgreSQL."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import judged_place
import pytest
import servers
from conftest import ROOT, clean_environment

from memgpt import environment, packaging, registry, tracking
from memgpt.errors import UserError
from memgpt.stages import promote

STAGE = """
import sys
from memgpt import environment
environment.prepare()
from memgpt import tracking
with tracking.stage_run("finetune", sys.argv[1], {"finetune": {sys.argv[1]: {"epochs": 4}}}) as run:
    run.curve([{"loss": 1 / step, "step": step} for step in range(1, 200)])
    run.client.log_text(run.id, sys.argv[1], "task.txt")
"""
FLOW = "from prefect import flow\n@flow(flow_run_name='kept')\ndef retrain(): pass\nretrain()"


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with servers.postgres("mlflow", "prefect") as where:
        yield where


@pytest.fixture(scope="module")
def cloud(database: str) -> Iterator[dict[str, str]]:
    """What an operator sets."""
    with servers.s3("mlflow") as env:
        yield {
            **env,
            "MLFLOW_TRACKING_URI": f"postgresql://{database}/mlflow",
            "MLFLOW_DEFAULT_ARTIFACT_ROOT": "s3://mlflow/artifacts",
        }


@pytest.fixture
def here(cloud: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process uses them, in an empty folder."""
    environment.prepare()
    monkeypatch.chdir(tmp_path)
    for name, value in cloud.items():
        monkeypatch.setenv(name, value)
    for name in ("MEMGPT_COMMIT", tracking.PARENT, "PREFECT__FLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def test_three_stages_at_once_on_an_empty_database(cloud: dict[str, str], tmp_path: Path, here: None) -> None:
    """MLflow alone loses two of three, which make its tables together."""
    env = {**clean_environment(), **cloud, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([sys.executable, "-c", STAGE, task], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
        for task in ("ner", "sentiment", "recommendation")
    ]
    said = [process.communicate()[1] for process in started]
    assert said == ["", "", ""]
    tracking.use()
    runs = tracking.client().search_runs([tracking.experiment(tracking.STAGES)])
    assert sorted(run.data.params.popitem()[0] for run in runs) == [
        "finetune.ner.epochs",
        "finetune.recommendation.epochs",
        "finetune.sentiment.epochs",
    ]
    for run in runs:
        assert run.info.status == "FINISHED"
        assert len(tracking.client().get_metric_history(run.info.run_id, "loss")) == 199
        assert run.info.artifact_uri.startswith("s3://mlflow/artifacts/memgpt/")
        assert [file.path for file in tracking.client().list_artifacts(run.info.run_id)] == ["task.txt"]
    assert not list(tmp_path.rglob("*")), "nothing is kept here"


def test_a_version_goes_to_s3_and_predicts_from_there(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaging, "CODE", judged_place.pack(tmp_path / "code" / "memgpt"))
    place = judged_place.Place(tmp_path)
    place.model(errors=0.1)
    verdict = promote.run(place.config, "sentiment")
    assert (verdict.verdict, verdict.version) == ("promote", "1")
    client = tracking.client()
    assert registry.aliases(client, "sentiment") == {"champion": "1"}
    assert registry.intact("sentiment", "1")
    assert not (tmp_path / "mlartifacts").exists()


def test_a_database_that_is_not_there_is_one_line(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = database.replace("memgpt@", "memgpt:secret@")
    for uri, told in {
        f"postgresql://{where}/nowhere": r'database "nowhere" does not exist',
        f"postgresql+pg8000://{where}/mlflow": r"no pg8000; write postgresql://",
    }.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(UserError, match=told) as caught:
            tracking.use()
        assert "secret" not in str(caught.value)


def test_prefect_keeps_its_runs_in_postgresql(database: str, tmp_path: Path) -> None:
    uri = f"postgresql+asyncpg://{database}/prefect"
    with servers.prefect(tmp_path, PREFECT_API_DATABASE_CONNECTION_URL=uri) as env:
        subprocess.run([sys.executable, "-c", FLOW], cwd=ROOT, env=env, check=True)
    assert servers.run_sql(f"{database}/prefect", "SELECT name, state_type FROM flow_run") == [("kept", "COMPLETED")]
    assert not list(tmp_path.glob("prefect.db*"))
