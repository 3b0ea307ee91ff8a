"""Batch scoring: a registered version predicts files of texts and writes Parquet parts to a folder or S3. A second run
resumes an interrupted one.

Each part has the rows of one chunk, in the order of the input, and is written whole or not at all. `_plan.json` records
what a run began with, so that another version or input is never mixed in. `_manifest.json` comes last. The columns:

    id, topic, time      of the input row, null where missing; time in UTC
    text                 of the input row; for recommendation `history`, a list of item ids and texts
    origin               file and line of the row
    base                 nats, tokens, bytes, bits_per_byte
    ner                  entities: a list of {text, type, score, start, end}
    sentiment            label, score_LABEL for each label, predicted_topic (null if trained without topics)
    recommendation       items: a list of {item_id, title, score}
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from memgpt import atomic, environment, gate, registry, sources, tables, tracking
from memgpt.config import Config, Source
from memgpt.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHUNK = 2000  # rows
PLAN, MANIFEST = "_plan.json", "_manifest.json"
_WORK = Path(".memgpt/score")  # per target: the lock, and the log of the version's process
_ENTITY = pa.struct(
    [("text", pa.string()), ("type", pa.string()), ("score", pa.float64()), ("start", pa.int64()), ("end", pa.int64())]
)
_ITEM = pa.struct([("item_id", pa.string()), ("title", pa.string()), ("score", pa.float64())])
_COLUMNS = {
    "base": [("nats", pa.float64()), ("tokens", pa.int64()), ("bytes", pa.int64()), ("bits_per_byte", pa.float64())],
    "ner": [("entities", pa.list_(_ENTITY))],
    "recommendation": [("items", pa.list_(_ITEM))],
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Scored:
    """The result of a run. skipped: the parts that existed already."""

    version: str
    rows: int
    parts: int
    skipped: int


def score(
    settings: Config,
    reference: str,
    uri: str,
    target: str,
    *,
    column: str | None = None,
    chunk: int = CHUNK,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, rows: None,
) -> Scored:
    """Score every row at `uri` with the version that `reference` names, into the parts at `target`.

    column: the input's text column, if it has none of the usual names. force: first remove existing parts.
    progress: called with the number of rows done and of all rows.

    Raises:
        UserError: for input that cannot be read, naming file and row; for a target with parts from another plan.
    """
    tracking.use()
    client = tracking.client()
    model, number = registry.resolve(client, reference)
    names = labels(client, model, number) if model == "sentiment" else []
    files = find("input", uri)
    out = _open(target)
    version = registry.uri(model, number)
    plan = {
        "version": version,
        "inputs": {file["path"]: digest(file) for file in files},
        "column": column,
        "chunk": chunk,
    }
    work = _WORK / hashlib.sha256(target.encode()).hexdigest()[:16]
    # Of two runs into one target, the second waits and continues where the first ended.
    with tracking.locked(work / "lock"), downloads(files) as cache:
        present = _begin(out, target, plan, force)
        if MANIFEST in present:
            manifest = json.loads(out.read(MANIFEST))
            return Scored(version, manifest["rows"], manifest["parts"], manifest["parts"])
        # Reads all rows before any scoring, so that a bad row is reported at once.
        total = sum(len(_checked(file, model, column, cache)) for file in files)
        rows = (row for file in files for row in _checked(file, model, column, cache))
        done = parts = skipped = 0
        with asking(settings, model, number, work) as ask:
            while taken := list(islice(rows, chunk)):
                name = f"part-{parts:05d}.parquet"
                if name in present:
                    skipped += 1
                else:
                    out.write(name, _parquet(_table(model, names, taken, ask(taken))))
                parts, done = parts + 1, done + len(taken)
                progress(done, total)
        columns = {field.name: str(field.type) for field in _schema(model, names)}
        whole = {"rows": done, "parts": parts, "columns": columns, "version": version, "inputs": plan["inputs"]}
        out.write(MANIFEST, _json(whole))
    return Scored(version, done, parts, skipped)


def labels(client: "MlflowClient", model: str, number: str) -> list[str]:
    """The labels of a version of sentiment.

    Raises:
        UserError: if it does not name them.
    """
    return json.loads(registry.lineage_tags(client, model, number, ["labels"])["labels"])


def find(key: str, uri: str) -> list[dict[str, Any]]:
    """The data files at a path, a glob, a folder or s3://bucket/prefix, each with what identifies its content.

    key: the name of the URI in error messages.
    """
    kind = sources.scheme(key, uri)
    if kind not in ("file", "s3"):
        raise UserError(f"{key}: {uri}: only files and s3://bucket/prefix are read here")
    files: list[dict[str, Any]] = sources.resolve(key, Source(uri=uri))["files"]
    return [{**file, "key": key, "uri": uri, "scheme": kind} for file in files]


def downloads(files: list[dict[str, Any]]) -> AbstractContextManager[Path | None]:
    """A folder where `read` keeps its downloads of these files, each once. It is temporary: in the cache of sources,
    private texts would stay."""
    return atomic.temporary() if any(file["scheme"] == "s3" for file in files) else nullcontext()


def read(
    file: dict[str, Any], column: str | None = None, history: bool = False, cache: Path | None = None
) -> list[Row]:
    """The rows of a file from `find`, as `tables.read_texts` gives them. cache: from `downloads`."""
    entry = {"uri": file["uri"], "scheme": file["scheme"], "files": [file]}
    if file["scheme"] == "s3":
        assert cache
        from memgpt.sources import s3  # boto3 is slow to import

        (part,) = s3.fetch(file["key"], entry, cache)
    else:
        (part,) = sources.fetch(file["key"], Source(uri=file["uri"]), entry)
    return tables.read_texts(part, column, history)


@contextmanager
def asking(settings: Config, model: str, number: str, work: Path) -> Iterator[Callable[[list[Row]], list[Any]]]:
    """Rows → answers of a registered version, which loads once, in a separate process.

    Raises:
        UserError: if the version does not load or predict.
    """
    with gate.Version(registry.uri(model, number), work, environment.threads(settings.runtime.threads)) as version:

        def ask(rows: list[Row]) -> list[Any]:
            version.ask([_input(model, row) for row in rows])
            try:
                return version.answer()
            except gate.VersionError as error:
                raise UserError(str(error)) from None

        yield ask


def _input(model: str, row: Row) -> Any:
    if model == "recommendation":
        return {"history": row["history"]}
    return {"text": row["text"], "topic": row["topic"]} if model == "sentiment" else row["text"]


def _checked(file: dict[str, Any], model: str, column: str | None, cache: Path | None) -> list[Row]:
    rows = read(file, column, model == "recommendation", cache)
    for row in rows:
        if model == "recommendation":
            if row["history"] is None:
                raise UserError(f"{row['at']}: no history; give every row one, if only an empty list")
        elif not (row["text"] or "").strip():
            raise UserError(f"{row['at']}: no text; take the row out, or give it one")
    return rows


def digest(file: dict[str, Any]) -> str:
    return file.get("sha256") or " ".join(filter(None, (file["etag"], file["version"])))


# ---- parts


def _schema(model: str, names: list[str]) -> pa.Schema:
    own = _COLUMNS.get(model) or [
        ("label", pa.string()),
        *((f"score_{name}", pa.float64()) for name in names),
        ("predicted_topic", pa.string()),
    ]
    main = ("history", pa.list_(pa.string())) if model == "recommendation" else ("text", pa.string())
    kept = [("id", pa.string()), ("topic", pa.string()), ("time", pa.timestamp("us")), main, ("origin", pa.string())]
    return pa.schema([*kept, *own])


def _table(model: str, names: list[str], rows: list[Row], answers: list[Any]) -> pa.Table:
    return pa.Table.from_pylist(
        [{**row, "origin": row["at"], **_flat(model, names, said)} for row, said in zip(rows, answers, strict=True)],
        schema=_schema(model, names),
    )


def _flat(model: str, names: list[str], answer: Any) -> dict[str, Any]:
    if model == "sentiment":
        scores = {f"score_{name}": answer["scores"].get(name) for name in names}
        return {"label": answer["label"], **scores, "predicted_topic": answer.get("predicted_topic")}
    return {"ner": {"entities": answer}, "recommendation": {"items": answer}}.get(model) or answer


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    tables.write(table, buffer)
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


# ---- where they go


class _Place(Protocol):
    """Named files, each written whole or not at all."""

    def names(self) -> set[str]: ...
    def read(self, name: str) -> bytes: ...
    def write(self, name: str, data: bytes) -> None: ...
    def remove(self, name: str) -> None: ...


class _Folder:
    def __init__(self, target: str) -> None:
        self.path = Path(target).expanduser()
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{target}: is a file; name a folder for the parts")

    def names(self) -> set[str]:
        return {path.name for path in self.path.iterdir()} if self.path.exists() else set()

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        with atomic.replacing(self.path / name) as aside:
            aside.write_bytes(data)

    def remove(self, name: str) -> None:
        (self.path / name).unlink()


class _Bucket:
    """S3: an object appears only when it is complete."""

    def __init__(self, target: str) -> None:
        from memgpt.sources import s3  # boto3 is slow to import

        self._s3, self._target = s3, target
        self._bucket, key = s3.parse("output", target)
        self._prefix = f"{key.rstrip('/')}/" if key else ""
        with s3.as_user_errors("output", target):
            self._client = s3.connect()

    def names(self) -> set[str]:
        with self._s3.as_user_errors("output", self._target):
            keys = self._s3.keys_below(self._client, self._bucket, self._prefix)
        return {key.removeprefix(self._prefix) for key in keys}

    def read(self, name: str) -> bytes:
        with self._s3.as_user_errors("output", self._target):
            return self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read()

    def write(self, name: str, data: bytes) -> None:
        with self._s3.as_user_errors("output", self._target):
            self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=data)

    def remove(self, name: str) -> None:
        with self._s3.as_user_errors("output", self._target):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)


def _open(target: str) -> _Place:
    kind = sources.scheme("output", target)
    if kind not in ("file", "s3"):
        raise UserError(f"output: {target}: parts go to a folder or to s3://bucket/prefix")
    return _Bucket(target) if kind == "s3" else _Folder(target)


def _begin(out: _Place, target: str, plan: dict[str, Any], force: bool) -> set[str]:
    """Write the plan if it is new; return the names of the files that already exist of this plan.

    Raises:
        UserError: saying what differs, if the target has files of another plan.
    """
    present = out.names()
    ours = {name for name in present if name in (PLAN, MANIFEST) or _is_part(name)}
    if PLAN in present and not force:
        differs = _difference(json.loads(out.read(PLAN)), plan)
        if differs:
            raise UserError(f"{target}: begun with {differs}; name another output, or start anew with --force")
        return present
    if ours and not force:
        raise UserError(f"{target}: has {min(ours)} but no {PLAN}; name another output, or start anew with --force")
    for name in sorted(ours, key=lambda name: name != MANIFEST):  # the manifest first: it vouches for the others
        out.remove(name)
    out.write(PLAN, _json(plan))
    return set()


def _is_part(name: str) -> bool:
    return name.startswith("part-") and name.endswith(".parquet")


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first difference between two plans, in words; None if there is none."""
    for key, what in (("version", "version"), ("chunk", "chunks of"), ("column", "column")):
        if old[key] != new[key]:
            return f"{what} {old[key]}, now {new[key]}"
    before, now = old["inputs"], new["inputs"]
    for path in sorted(before.keys() | now.keys()):
        if before.get(path) != now.get(path):
            how = "which is gone" if path not in now else "which has changed" if path in before else None
            return f"{path}, {how}" if how else f"other input, without {path}"
    return None
