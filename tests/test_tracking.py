"""Runs are logged where they should be, first uses do not race, and a server that is not there says so in one line."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import ROOT
from servers import free_port, mlflow

from memgpt import cli, environment, lineage, registry, tracking
from memgpt.errors import UserError


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    environment.prepare()
    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.delenv(tracking.PARENT, raising=False)
        patch.chdir(root)
        tracking.use()
        yield root


def runs() -> list:
    client = tracking.client()
    return client.search_runs([tracking.experiment(tracking.STAGES)])


def test_a_stage_run_holds_params_metrics_and_curves(store: Path) -> None:
    with tracking.stage_run("finetune", "ner", {"epochs": 4, "source": {"uri": "sample://newsroom"}}) as run:
        run.metrics({"loss": 1.5}, step=10)
        run.curve([{"loss": 1.0, "step": 20}, {"loss": 0.5, "step": 30, "note": "not a number"}])
        run.metrics({"f1@exact": 0.75, "f1_" + 300 * "a": 1.0})
    found = tracking.client().get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"epochs": "4", "source.uri": "sample://newsroom"}
    assert found.data.metrics == {"loss": 0.5, "f1_exact": 0.75, "f1_" + 247 * "a": 1.0}
    history = tracking.client().get_metric_history(run.id, "loss")
    assert [(point.step, point.value) for point in history] == [(10, 1.5), (20, 1.0), (30, 0.5)]
    assert found.info.artifact_uri.startswith((store / "mlartifacts" / "memgpt").as_uri())


def test_a_stage_run_names_its_data(store: Path) -> None:
    folder = store / "data" / "tables" / "ner"
    folder.mkdir(parents=True)
    manifest = {"source": "s3://news/wikigold", "rows": {"train": 3, "test": 1}}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with tracking.stage_run("finetune", "ner") as run:
        run.inputs(["ner", "sentiment"], "training")  # sentiment has no tables here
    (found,) = tracking.client().get_run(run.id).inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.source_type) == ("ner", "s3")
    assert json.loads(found.dataset.source) == {"uri": "s3://news/wikigold"}
    assert json.loads(found.dataset.profile) == {"train_rows": 3, "test_rows": 1}
    assert lineage.digest(folder).startswith(found.dataset.digest)
    assert {tag.key: tag.value for tag in found.tags} == {"mlflow.data.context": "training"}


def test_a_long_run_shows_the_machine(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with tracking.stage_run("pretrain") as run, run.machine():
        deadline = time.monotonic() + 120
        while not (found := tracking.client().get_run(run.id).data.metrics) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(found)


def test_a_failing_stage_is_a_failed_run(store: Path) -> None:
    with pytest.raises(UserError), tracking.stage_run("ingest", "corpus") as run:
        raise UserError("data.corpus.uri: empty")
    found = tracking.client().get_run(run.id)
    assert (found.info.status, found.data.tags["error"]) == ("FAILED", "UserError: data.corpus.uri: empty")


def test_stage_runs_nest_under_the_flows_run(store: Path) -> None:
    with tracking.flow_run("retrain") as flow, tracking.stage_run("pretrain") as stage:
        assert os.environ[tracking.PARENT] == flow.id
    assert tracking.PARENT not in os.environ
    assert tracking.client().get_run(stage.id).data.tags["mlflow.parentRunId"] == flow.id


def test_a_killed_stage_does_not_stay_running(store: Path) -> None:
    script = "import os; from memgpt import tracking as t; run = t.stage_run('tokenize'); run.__enter__(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", script], cwd=store, check=False).returncode == 9
    assert [run.info.status for run in runs() if run.data.tags["stage"] == "tokenize"] == ["RUNNING"]
    with tracking.stage_run("tokenize"):
        pass
    statuses = [run.info.status for run in runs() if run.data.tags["stage"] == "tokenize"]
    assert statuses == ["FINISHED", "KILLED"]


def test_first_uses_at_once_do_not_race(tmp_path: Path) -> None:
    """Three processes on a fresh folder: MLflow alone would lose some of them while migrating."""
    script = "from memgpt import tracking; tracking.use(); print(tracking.experiment('memgpt'))"
    variables = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    started = [
        subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=variables, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(set(answers)) == 1
    assert [path.name for path in tmp_path.glob("*.db*")] == ["mlflow.db"]
    assert not list(tmp_path.glob(".mlflow.db*"))


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:{port}", "http://user:secret@127.0.0.1:{port}", "https://user:secret@mlflow.invalid"]
)
def test_a_server_that_does_not_answer_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(port=port))
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        tracking.use(tmp_path)
    message = str(caught.value)
    assert "MLFLOW_TRACKING_URI" in message
    assert "\n" not in message
    assert "secret" not in message
    assert time.monotonic() - start < 20


def test_a_server_answers_whatever_it_thinks_of_us_and_a_password_is_no_part_of_its_host() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        server.RequestHandlerClass.log_message = lambda *told: None  # type: ignore[method-assign]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        assert tracking.no_server(f"http://127.0.0.1:{port}") is None  # 404: it is there
        assert tracking.no_server(f"http://user:secret@127.0.0.1:{port}/") is None
        server.shutdown()


def test_a_failure_without_words_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise TimeoutError

    monkeypatch.setattr(tracking.urllib.request, "urlopen", fails)
    assert tracking.no_server("http://127.0.0.1:1") == "TimeoutError"


def test_looking_for_decisions_makes_no_experiment(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/other.db")
    assert registry.records(client, "ner") == []
    assert client.get_experiment_by_name(tracking.PROMOTIONS) is None


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:secret@host/path", "http://user:***@host/path"),
        ("postgresql://user:ab/c@d+1@db/mlflow", "postgresql://user:***@db/mlflow"),
        ("https://token@host:5000", "https://***@host:5000"),
        ("postgresql://h/db?user=u&password=secret&x=1", "postgresql://h/db?user=u&password=***&x=1"),
        ("postgresql://user@h/db", "postgresql://user@h/db"),
        ("sqlite:////tmp/a@b.db", "sqlite:////tmp/a@b.db"),
    ],
)
def test_no_secret_is_shown(uri: str, shown: str) -> None:
    assert tracking.shown(uri) == shown


def test_a_server_that_is_away_for_a_while_loses_nothing(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of a stage: training goes on, and what it says waits."""
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(tracking, "PAUSES", (0.2,) * 600)
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(mlflow(port, tmp_path))
        with tracking.stage_run("pretrain") as run:
            curve = cli.stages._Curve(run)
            curve.sent = 0.0
            first.close()
            curve({"loss": 3.0}, 1)  # nobody hears it
            assert curve.points
            back = threading.Timer(1.0, lambda: second.enter_context(mlflow(port, tmp_path)))
            back.start()
            tracking.patiently(curve.flush)
            run.metrics({"tokens": 5})
        back.join()
        found = tracking.client().get_run(run.id)
        assert found.info.status == "FINISHED"
        assert found.data.metrics == {"loss": 3.0, "tokens": 5}


def test_what_a_stage_made_outlives_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server, port = ExitStack(), free_port()
    monkeypatch.chdir(ROOT)  # for params.yaml
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(tracking, "PAUSES", (0.1,))
    server.enter_context(mlflow(port, tmp_path))

    def stage(*_: object, **__: object) -> dict[str, float]:
        server.close()
        return {"f1": 0.5}

    monkeypatch.setattr(cli.stages, "_stage", stage)
    cli.stages._tracked("evaluate", "ner")
    assert "warning: what evaluate made is kept, its metrics are not in MLflow" in capsys.readouterr().err


def test_only_a_server_that_does_not_answer_is_waited_for() -> None:
    from mlflow.exceptions import MlflowException

    gone = MlflowException("API request to http://here/runs/log-batch failed with exception Max retries exceeded")
    assert "no MLflow server answers" in str(tracking.unreachable(gone))
    assert tracking.unreachable(MlflowException("Invalid parameter value")) is None
    assert tracking.unreachable(ValueError("API request failed with exception")) is None


def test_a_store_that_refuses_is_told_at_once_and_one_that_is_away_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, ReadTimeoutError

    def answers(status: int, code: str) -> ClientError:
        return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")

    uploads = {}
    for status, code in ((403, "AccessDenied"), (503, "SlowDown")):
        try:
            try:
                raise answers(status, code)
            except ClientError as error:
                raise S3UploadFailedError(f"Failed to upload: {error}")  # noqa: B904 as boto3 does
        except S3UploadFailedError as error:
            uploads[code] = error
    denied, gone = answers(403, "AccessDenied"), answers(404, "NoSuchBucket")
    refused = [NoCredentialsError(), denied, gone, uploads["AccessDenied"]]
    away = [EndpointConnectionError(endpoint_url="http://here"), ReadTimeoutError(endpoint_url="http://here")]
    for error in refused:
        assert tracking.unreachable(error) is None
        assert str(tracking.as_user_error(error)).startswith("the artifact store: ")
    for error in [*away, answers(500, "InternalError"), answers(400, "Throttling"), uploads["SlowDown"]]:
        assert "the artifact store" in str(tracking.unreachable(error))

    answer = Mock(side_effect=[gone, denied])
    monkeypatch.setattr("mlflow.artifacts.list_artifacts", answer)
    assert not registry.intact("ner", "1")
    with pytest.raises(UserError, match=r"the artifact store: .*AccessDenied"):
        registry.intact("ner", "1")


def test_checkouts_with_one_remote_registry_decide_one_after_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://registry:5000")
    homes = []
    for name in ("checkout", "workspace"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        homes.append(tracking.home().resolve())
    assert homes[0] == homes[1] and homes[0].is_dir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://another:5000")
    assert tracking.home() != homes[0]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # which cannot be written to
    assert tracking.home() == tracking.LOCAL
