"""MLflow runs. By default all is in `mlflow.db` and `mlartifacts/` of the repository. MLFLOW_TRACKING_URI names a
server instead, or a database, for which MLFLOW_DEFAULT_ARTIFACT_ROOT says where artifacts go.

    tracking.use()
    with tracking.stage_run("finetune", "ner", {"finetune": {"ner": params}}) as run:
        run.metrics(stage(...))

MLflow is imported on first use (1.5 s). Run ids are always explicit; its process-wide active run is never used.
"""

import fcntl
import hashlib
import http.client
import json
import os
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from memgpt import environment, lineage
from memgpt.config import TABLES
from memgpt.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

STAGES = "memgpt"  # the experiment of stage and flow runs
PROMOTIONS = "promotions"  # the experiment of promotion records, one run per decision
PARENT = "MEMGPT_PARENT_RUN"  # environment: the flow's run, under which stage runs nest
LOCAL = Path(".memgpt")

PAUSES = (1, 2, 4, 8, 15, 30, 60)  # seconds between retries, two minutes in all
NO_SERVER, NO_DATABASE = "no MLflow server answers", "no database there"  # both may be temporary
_TURN = 6_368_110  # id of the database lock: any number that no other program locks
_BATCH = 1000  # metrics in one request, MLflow's limit
_NAME = re.compile(r"[^\w.\- /]")  # characters that MLflow refuses in a metric's name
_LONGEST_NAME = 250  # characters of a metric's name, MLflow's limit; a label or a topic may be longer


class Unreachable(UserError):
    """The tracking server or the artifact store does not answer."""


def patiently(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call MLflow; retry for two minutes while its server or artifact store does not answer.

    Raises:
        Unreachable: if it still does not answer.
    """
    for pause in (*PAUSES, None):
        try:
            return call(*args, **kwargs)
        except Exception as error:
            gone = unreachable(error)
            if gone is None:
                raise
            if pause is None:
                raise gone from error
            time.sleep(pause)
    raise AssertionError("the last pause is None")


def unreachable(error: Exception) -> Unreachable | None:
    """The error in one line if it means that MLflow's server or the artifact store does not answer, else None."""
    told = as_user_error(error)
    return told if isinstance(told, Unreachable) else None


def as_user_error(error: Exception) -> UserError | None:
    """The error in one line if the artifact store or the connection to MLflow's server caused it, else None."""
    if isinstance(error, Unreachable):
        return error
    if type(error).__module__.startswith(("botocore.", "boto3.")):
        kind = Unreachable if _no_store(error) else UserError
        told = (str(error) or type(error).__name__).splitlines()[0]
        return kind(f"the artifact store: {told}; check AWS_ENDPOINT_URL, its credentials and the network")
    if type(error).__name__ != "MlflowException" or " failed with exception " not in str(error):
        return None
    return _no_answer(os.environ.get("MLFLOW_TRACKING_URI", ""), "lost on the way")


def _no_store(error: Exception) -> bool:
    """Whether an error of boto3 means that the store does not answer or is overloaded."""
    from boto3.exceptions import RetriesExceededError, S3UploadFailedError
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError

    cause = error.__context__ if isinstance(error, S3UploadFailedError) else error
    if isinstance(cause, ClientError):
        status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or "Throttl" in cause.response.get("Error", {}).get("Code", "")
    return isinstance(cause, ConnectionError | HTTPClientError | RetriesExceededError)


def _no_answer(uri: str, reason: object) -> Unreachable:
    return Unreachable(
        f"MLFLOW_TRACKING_URI={shown(uri)}: {NO_SERVER} ({reason}); "
        "start it, or unset the variable to track in mlflow.db"
    )


def location(root: Path | str | None = None) -> str:
    """The URI of the tracking store, with `root` as in `use`. A file's path is absolute, since versions are loaded in
    processes with other working directories."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        root = Path(root or os.environ.get("DVC_ROOT") or ".").resolve()
        uri = f"sqlite:///{root / uri.removeprefix('sqlite:///')}"
    return uri


def use(root: Path | str | None = None) -> str:
    """Make the tracking store ready and return its URI; cheap if it already is.

    root: the checkout's; by default this folder, or, in a queued experiment's own folder, the checkout it is from.

    A new SQLite file is created under another name, with a lock, and then renamed. Otherwise two first uses at once
    would both migrate it and one would fail. A kill half-way leaves no file.

    Raises:
        UserError: if the configured server or database cannot be reached.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    uri = os.environ["MLFLOW_TRACKING_URI"] = location(root)
    if uri.startswith(("http://", "https://")):
        if why := no_server(uri):  # MLflow itself would retry for minutes and end in a stack trace
            raise _no_answer(uri, why)
    elif uri.startswith("postgresql"):
        _take_turns(uri)
    elif uri.startswith("sqlite:///"):
        database = Path(uri.removeprefix("sqlite:///"))
        if not database.exists():
            with locked(database.parent / LOCAL / "mlflow.lock"):
                if not database.exists():
                    _create(database)
    import mlflow

    if mlflow.get_tracking_uri() != uri:
        mlflow.set_tracking_uri(uri)
    return uri


def client() -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient()


def experiment(name: str) -> str:
    """The experiment's id. It is created if needed, with an explicit artifact location, which then stays."""
    return _experiment(client(), name, _artifacts(os.environ.get("MLFLOW_TRACKING_URI", "")))


def home() -> Path:
    """The folder for locks of the processes on this machine that share the tracking store: beside its SQLite file; for
    other stores in the user's cache, or, if that is not writable, in this folder."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("sqlite:///"):
        return Path(uri.removeprefix("sqlite:///")).parent / LOCAL
    try:
        folder = environment.shared_folder("registries") / hashlib.sha256(uri.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return LOCAL
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file; the system releases it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Run:
    """One MLflow run that is being written."""

    def __init__(self, client: "MlflowClient", run_id: str) -> None:
        self.client = client
        self.id = run_id

    def params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(_NAME.sub("_", key), str(value)) for key, value in sorted(_flat(params).items())]
        for start in range(0, len(entries), 100):
            patiently(self.client.log_batch, self.id, params=entries[start : start + 100])

    def metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        patiently(self.curve, [{**metrics, "step": step}])

    def curve(self, points: list[dict[str, float]]) -> None:
        """Log many points at once, each a mapping of metrics with its `step`, such as a Trainer's log history."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        entries = [
            Metric(_NAME.sub("_", name)[:_LONGEST_NAME], float(value), now, int(point.get("step", 0)))
            for point in points
            for name, value in point.items()
            if name != "step" and isinstance(value, int | float)
        ]
        for start in range(0, len(entries), _BATCH):
            self.client.log_batch(self.id, metrics=entries[start : start + _BATCH])

    def inputs(self, sources: Iterable[str], context: str) -> None:
        """Log the tables that the run reads as MLflow datasets; a source without tables is skipped.

        context: their purpose, such as "training". The digest is the start of the one in lineage.json, since MLflow
        allows 36 characters.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        datasets = []
        for name in sources:
            folder = TABLES / name
            if not (folder / "manifest.json").is_file():
                continue
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            scheme, separator, _ = manifest["source"].partition("://")
            dataset = Dataset(
                name=name,
                digest=lineage.digest(folder)[:32],
                source_type=scheme if separator else "local",
                source=json.dumps({"uri": manifest["source"]}),
                profile=json.dumps({f"{table}_rows": rows for table, rows in manifest["rows"].items()}),
            )
            datasets.append(DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)]))
        patiently(self.client.log_inputs, self.id, datasets)

    @contextmanager
    def machine(self) -> Iterator[None]:
        """Meanwhile log the machine's usage every ten seconds under `system/`: CPU, memory, disk, network, GPU. It is
        that of the whole machine, including other processes; a shorter run has none."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(self.id)
        monitor.start()
        try:
            yield
        finally:
            monitor.finish()

    def tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        patiently(self.client.log_batch, self.id, tags=[RunTag(key, value) for key, value in tags.items()])

    def end(self, status: str) -> None:
        patiently(self.client.set_terminated, self.id, status)


@contextmanager
def stage_run(
    stage: str, item: str | None = None, params: Mapping[str, Any] | None = None, parent: str | None = None
) -> Iterator[Run]:
    """One run around a stage, nested under `parent`, by default the flow's run (MEMGPT_PARENT_RUN). It ends FINISHED,
    or FAILED (KILLED if interrupted) with the error's text as a tag. Runs of the same stage that a killed process on
    this machine left open are closed as KILLED.

    Raises:
        Unreachable: if the tracking server cannot be reached.
    """
    use()
    mlflow_client = client()
    experiment_id = experiment(STAGES)
    name = f"{stage} {item}" if item else stage
    _bury(mlflow_client, experiment_id, name)
    tags = {"stage": stage, "item": item or "", "host": socket.gethostname(), "pid": str(os.getpid())}
    tags["experiment"] = os.environ.get("DVC_EXP_NAME", "")
    parent = parent or os.environ.get(PARENT)
    if parent:
        tags["mlflow.parentRunId"] = parent
    info = mlflow_client.create_run(experiment_id, run_name=name, tags={k: v for k, v in tags.items() if v}).info
    run = Run(mlflow_client, info.run_id)
    try:
        if params:
            run.params(params)
        yield run
    except Unreachable:
        raise
    except BaseException as error:
        with suppress(Unreachable):  # the first error is the one to report
            run.tags({"error": f"{type(error).__name__}: {error}"[:1000]})
            run.end("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    else:
        run.end("FINISHED")


@contextmanager
def flow_run(name: str, params: Mapping[str, Any] | None = None) -> Iterator[Run]:
    """The run under which a flow's stage runs are nested; sets MEMGPT_PARENT_RUN for child processes meanwhile."""
    before = os.environ.pop(PARENT, None)
    with stage_run(name, params=params) as run:
        os.environ[PARENT] = run.id
        try:
            yield run
        finally:
            os.environ.pop(PARENT)
            if before is not None:
                os.environ[PARENT] = before


def _create(database: Path) -> None:
    from mlflow import MlflowClient

    for leftover in database.parent.glob(f".{database.name}.*partial*"):
        leftover.unlink()
    aside = database.parent / f".{database.name}.{os.getpid()}.partial"
    fresh = MlflowClient(tracking_uri=f"sqlite:///{aside}")
    for name in (STAGES, PROMOTIONS):
        _experiment(fresh, name, _artifacts(f"sqlite:///{database}"))
    fresh.search_registered_models(max_results=1)  # the registry also checks its tables at first use
    aside.rename(database)


@cache
def _take_turns(uri: str) -> None:
    """Create MLflow's tables in a PostgreSQL database if it has none, one process at a time over all machines. Of three
    first uses at once, two would otherwise fail."""
    import sqlalchemy
    from mlflow import MlflowClient

    try:
        with sqlalchemy.create_engine(uri, connect_args={"connect_timeout": 10}).connect() as connection:
            connection.execute(sqlalchemy.text(f"SELECT pg_advisory_lock({_TURN})"))  # held until the connection ends
            first = MlflowClient(tracking_uri=uri)
            first.search_experiments(max_results=1)
            first.search_registered_models(max_results=1)
    except ModuleNotFoundError as error:  # another driver's name in the URI
        raise UserError(f"MLFLOW_TRACKING_URI={shown(uri)}: no {error.name}; write postgresql://") from None
    except sqlalchemy.exc.OperationalError as error:
        why = str(error.orig).strip().splitlines()[0]
        raise UserError(
            f"MLFLOW_TRACKING_URI={shown(uri)}: {NO_DATABASE} ({why}); start or create it, or unset the variable "
            "to track in mlflow.db"
        ) from None


def shown(uri: str) -> str:
    """The URI without a password or token, for display."""
    uri = re.sub(r"//([^/@:]*):.*@", r"//\1:***@", uri)  # up to the last @: a password may contain @ or /
    uri = re.sub(r"^(https?)://[^/@:]+@", r"\1://***@", uri)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", uri)


def _experiment(mlflow_client: "MlflowClient", name: str, artifacts: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = mlflow_client.get_experiment_by_name(name)
    if found is None:
        try:
            location = f"{artifacts}/{name}" if artifacts else None
            return mlflow_client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another process was first
                raise
            found = mlflow_client.get_experiment_by_name(name)
            assert found is not None
    if found.lifecycle_stage == "deleted":
        restore = f"mlflow experiments restore -x {found.experiment_id}"
        raise UserError(f"MLflow experiment {name!r} is deleted; restore it: {restore}")
    return found.experiment_id


def _artifacts(uri: str) -> str | None:
    """Where an experiment's artifacts go. A server decides itself (None); a database does not, so we do."""
    if uri.startswith(("http://", "https://")):
        return None
    configured = os.environ.get("MLFLOW_DEFAULT_ARTIFACT_ROOT")
    if configured:
        return configured.rstrip("/")
    folder = Path(uri.removeprefix("sqlite:///")).parent if uri.startswith("sqlite:///") else Path.cwd()
    return (folder.resolve() / "mlartifacts").as_uri()


def no_server(url: str, seconds: float = 10) -> str | None:
    """Why no server answers at a URL; None if one does, even by refusing access, since a proxy may guard /health."""
    try:
        parts = urllib.parse.urlsplit(url)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()  # a password would be taken for a host
        with urllib.request.urlopen(f"{bare.rstrip('/')}/health", timeout=seconds):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}" if error.code >= 500 else None
    except (OSError, ValueError, http.client.HTTPException) as error:  # URLError is an OSError
        return str(getattr(error, "reason", error)) or type(error).__name__


def _bury(mlflow_client: "MlflowClient", experiment_id: str, name: str) -> None:
    host = socket.gethostname()
    query = f"attributes.status = 'RUNNING' and attributes.run_name = '{name}' and tags.host = '{host}'"
    for run in mlflow_client.search_runs([experiment_id], query):
        if not psutil.pid_exists(int(run.data.tags["pid"])):
            mlflow_client.set_terminated(run.info.run_id, "KILLED")


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
