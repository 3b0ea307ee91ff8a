"""Batch scoring: every row once, whole parts, a run that is cut short goes on, and nothing is mixed."""

import gzip
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pandas as pd
import pyarrow.parquet as pq
import pytest
from judged_place import Place, gold, settle
from typer.testing import CliRunner

from memgpt import cli, registry, scoring, tracking
from memgpt.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[Place]:
    """A checkout with versions 1, the champion, and 2 of a sentiment model, which makes no errors."""
    with pytest.MonkeyPatch.context() as patch:
        made = settle(tmp_path_factory.mktemp("scoring") / "root", database, patch)
        client = tracking.client()
        for epochs in (1, 2):
            made.model(errors=0.0, epochs=epochs)
            version = registry.register(client, registry.candidate("sentiment"))
        registry.carry_out(client, registry.Change("sentiment", "promote", "1", None, ["by a test"], "test"))
        assert version == "2"
        yield made


@pytest.fixture(autouse=True)
def in_place(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(place.root)
    shutil.copy(Path(__file__).parents[1] / "params.yaml", place.root)
    yield
    for path in ("in", "out"):
        shutil.rmtree(path, ignore_errors=True)


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    path = Path("in") / name
    path.parent.mkdir(exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def some(start: int, count: int) -> list[dict[str, Any]]:
    return [{"id": f"n{i}", "text": f"text {i}", "topic": "rates"} for i in range(start, start + count)]


@pytest.fixture(scope="module")
def kept(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Versions' processes that live for all tests: starting one takes seconds."""
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("versions")
        yield {n: stack.enter_context(scoring.asking(place.config, "sentiment", n, folder)) for n in ("1", "2")}


@pytest.fixture
def at_hand(kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "asking", lambda settings, model, number, work: nullcontext(kept[number]))


def score(place: Place, **options: Any) -> scoring.Scored:
    given = {"reference": "sentiment", "uri": "in", "target": "out", "chunk": 4, **options}
    return scoring.score(place.config, **given)


def test_each_row_with_its_answer_whatever_the_format(place: Place) -> None:
    write(
        "a.jsonl.gz", [{"id": 7, "text": "text 1", "topic": "rates", "time": "2024-05-31T12:00:00+02:00"}, *some(2, 3)]
    )
    Path("in/b-test.csv").write_text("date,sentence\n2024-06-01,text 5\n2024-06-01,text 6\n")  # no split is looked for
    Path("in/c.txt").write_text("text 7\n\ntext 8\ngoes on\n")
    told: list[tuple[int, int]] = []
    done = score(place, progress=lambda *counts: told.append(counts))
    assert done == scoring.Scored("models:/memgpt-sentiment/1", rows=8, parts=2, skipped=0)
    assert told == [(4, 8), (8, 8)]
    parts = [pq.read_table(path) for path in sorted(Path("out").glob("*.parquet"))]
    assert [part.num_rows for part in parts] == [4, 4]
    rows = [row for part in parts for row in part.to_pylist()]
    assert [row["text"] for row in rows] == [*(f"text {i}" for i in range(1, 8)), "text 8\ngoes on"]
    assert [row["label"] for row in rows] == [gold(row["text"]) for row in rows]
    first = rows[0]
    assert (first["id"], first["topic"], first["time"].isoformat()) == ("7", "rates", "2024-05-31T10:00:00")
    assert first["origin"] == "in/a.jsonl.gz line 1"
    assert first[f"score_{first['label']}"] == 1.0
    assert rows[5]["origin"] == "in/b-test.csv line 3"
    manifest = json.loads(Path("out/_manifest.json").read_text())
    assert manifest["rows"] == 8 == len(pd.read_parquet("out")) and manifest["version"] == done.version
    assert manifest["columns"] == {field.name: str(field.type) for field in parts[0].schema}
    assert set(manifest["inputs"]) == {"in/a.jsonl.gz", "in/b-test.csv", "in/c.txt"}


def test_a_run_that_was_cut_short_goes_on(place: Place, at_hand: None, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.jsonl", some(0, 10))
    whole = score(place, target="whole")
    expected = {path.name: path.read_bytes() for path in Path("whole").iterdir()}
    shutil.rmtree("whole")

    def stop(done: int, rows: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(place, progress=stop)
    assert {path.name for path in Path("out").iterdir()} == {"_plan.json", "part-00000.parquet"}
    kept = Path("out/part-00000.parquet").stat().st_mtime_ns
    assert score(place) == scoring.Scored(whole.version, rows=10, parts=3, skipped=1)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == expected
    assert Path("out/part-00000.parquet").stat().st_mtime_ns == kept
    monkeypatch.setattr(scoring, "asking", None)  # nobody is asked again
    assert score(place).skipped == 3


def test_what_does_not_belong_to_the_parts_is_told_and_force_starts_anew(place: Place, at_hand: None) -> None:
    write("a.jsonl", some(0, 6))
    score(place)
    for change, told in (
        (
            {"reference": "sentiment/2"},
            "out: begun with version models:/memgpt-sentiment/1, now .*--force",
        ),
        ({"chunk": 5}, "out: begun with chunks of 4, now 5"),
    ):
        with pytest.raises(UserError, match=told):
            score(place, **change)
    write("b.jsonl", some(6, 1))
    with pytest.raises(UserError, match=r"out: begun with other input, without in/b.jsonl"):
        score(place)
    write("a.jsonl", some(0, 1))
    with pytest.raises(UserError, match=r"out: begun with in/a.jsonl, which has changed"):
        score(place)
    done = score(place, reference="sentiment/2", force=True)
    assert (done.version, done.rows, done.skipped) == ("models:/memgpt-sentiment/2", 2, 0)
    assert {path.name for path in Path("out").iterdir()} == {"_plan.json", "part-00000.parquet", "_manifest.json"}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"text": "fine"}, {"text": " "}], "in/a.jsonl line 2: no text"),
        ([{"text": "fine"}, {"id": "2"}], "in/a.jsonl line 2: no text"),
        ([{"body": "x"}], "in/a.jsonl: no column 'text' or .*'content'; it has body"),
        ([{"text": "fine", "time": "soon"}], "in/a.jsonl line 1: column 'time' is not a time"),
    ],
)
def test_a_bad_row_is_told_before_anything_is_scored(
    place: Place, rows: list[dict[str, Any]], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "asking", None)
    write("a.jsonl", rows)
    with pytest.raises(UserError, match=told):
        score(place)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"uri": "nowhere"}, "input: nowhere: no such file or folder"),
        ({"uri": "sample://newsroom"}, "input: sample://newsroom: only files and s3://"),
        ({"target": "hf://x/y"}, "output: hf://x/y: parts go to a folder or"),
        ({"target": "params.yaml"}, "params.yaml: is a file; name a folder"),
        ({"reference": "sentiment/9"}, "no such version; there are 2, 1"),
    ],
)
def test_mistakes_are_told_in_one_line(place: Place, changes: dict[str, Any], told: str) -> None:
    write("a.jsonl", some(0, 1))
    with pytest.raises(UserError, match=told) as caught:
        score(place, **changes)
    assert "\n" not in str(caught.value)


def test_the_columns_of_the_other_models() -> None:
    text = {"id": None, "topic": None, "time": None, "text": "Ada left", "at": "a line 1"}
    entity = {"text": "Ada", "type": "PER", "score": 0.9, "start": 0, "end": 3}
    [row] = scoring._table("ner", [], [text], [[entity]]).to_pylist()
    assert (row["text"], row["entities"]) == ("Ada left", [entity])
    said = {"nats": 2.0, "tokens": 3, "bytes": 8, "bits_per_byte": 0.36}
    [row] = scoring._table("base", [], [text], [said]).to_pylist()
    assert said.items() <= row.items()
    items = [{"item_id": "i1", "title": "One", "score": 0.5}, {"item_id": None, "title": "new", "score": 0.1}]
    [row] = scoring._table("recommendation", [], [{**text, "history": ["i2"]}], [items]).to_pylist()
    assert (row["history"], row["items"]) == (["i2"], items)


def test_histories_are_lists(place: Place) -> None:
    write("a.jsonl", [{"history": ["i1", "a new text"]}, {"history": []}])
    Path("in/b.csv").write_text('history\n"[""i 1"", ""i2""]"\n')
    files = scoring.find("input", "in")
    read = [row["history"] for file in files for row in scoring.read(file, history=True)]
    assert read == [["i1", "a new text"], [], ["i 1", "i2"]]


def test_from_s3_to_s3(place: Place, at_hand: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    from memgpt.sources import s3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(key, "test")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        client = boto3.client("s3", region_name="us-east-1")
        bucket = f"bucket{time.time_ns()}"
        client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key="news/a.jsonl", Body=b'{"text": "text 1"}\n{"text": "text 2"}\n')
        where = {"uri": f"s3://{bucket}/news", "target": f"s3://{bucket}/scored/today", "chunk": 1}
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        downloaded = Mock(wraps=s3._download)
        monkeypatch.setattr(s3, "_download", downloaded)
        assert score(place, **where).parts == 2
        assert downloaded.call_count == 1 and not list(tmp_path.iterdir())
        keys = {item["Key"] for item in client.list_objects_v2(Bucket=bucket, Prefix="scored/")["Contents"]}
        assert keys == {
            f"scored/today/{name}"
            for name in ("_plan.json", "_manifest.json", "part-00000.parquet", "part-00001.parquet")
        }
        assert not list(place.root.rglob("*.jsonl"))  # the texts, which may be private, stay in the bucket
        client.delete_object(Bucket=bucket, Key="scored/today/_manifest.json")
        client.delete_object(Bucket=bucket, Key="scored/today/part-00001.parquet")
        assert score(place, **where).skipped == 1
        client.put_object(Bucket=bucket, Key="news/a.jsonl", Body=b'{"text": "text 3"}\n')
        with pytest.raises(UserError, match="which has changed"):
            score(place, **where)
        with pytest.raises(UserError, match="output: s3://nowhere/x: no such bucket"):
            score(place, uri=where["uri"], target="s3://nowhere/x")
    finally:
        server.stop()


def test_the_command_says_what_it_did_and_leaves_no_copy_of_the_version(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    write("a.jsonl", [{"id": "1", "body_text": "text 1"}])
    ran = CliRunner().invoke(cli.app, ["score", "sentiment@champion", "in", "out", "--text", "body_text"])
    assert ran.exit_code == 0, ran.output
    assert "score models:/memgpt-sentiment/1: 1 rows in out, 1 parts" in ran.output
    assert pq.read_table("out/part-00000.parquet")["label"].to_pylist() == [gold("text 1")]
    assert list(tmp_path.iterdir()) == []
