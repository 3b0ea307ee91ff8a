"""Validate passes good tables, and each of its checks blocks planted bad rows without showing their text."""

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_place
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memgpt import config, suites, tables
from memgpt.errors import UserError
from memgpt.stages import ingest, snapshot, validate

REAL = os.environ.get("MEMGPT_REAL_DATA")
Edit = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
SECRET = "Zanzibar"  # planted in bad rows; may stand in reports/errors only


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> config.Config:
    monkeypatch.chdir(tmp_path)
    data_place.write_sources()
    settings = data_place.configured()
    snapshot.run(settings)
    for source in config.SOURCES:
        ingest.run(settings, source)
    return settings


def report(source: str) -> dict[str, Any]:
    return json.loads((validate.REPORTS / f"{source}.json").read_text())


def failed(source: str) -> set[tuple[str, str]]:
    return {(result["table"], result["name"]) for result in report(source)["results"] if not result["success"]}


def change(source: str, table: str, edit: Edit) -> None:
    path = config.TABLES / source / f"{table}.parquet"
    before = pq.read_table(path)
    tables.write(pa.Table.from_pylist(edit(before.to_pylist()), schema=before.schema), path)


def test_good_tables_pass_and_the_reports_are_stable(place: config.Config) -> None:
    for source in config.SOURCES:
        metrics = validate.run(place, source)
        assert metrics["failed"] == 0 and metrics["checks"] == len(report(source)["results"]) > 10
        before = [(validate.REPORTS / f"{source}{suffix}").read_bytes() for suffix in (".json", ".html")]
        validate.run(place, source)
        assert [(validate.REPORTS / f"{source}{suffix}").read_bytes() for suffix in (".json", ".html")] == before
        page = before[1].decode()
        assert "http" not in page and "<script" not in page and "All " in page and "<svg" in page
    assert not validate.ERRORS.exists() or not list(validate.ERRORS.iterdir())


def keep(count: int) -> Edit:
    return lambda rows: rows[:count]


def doubled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*rows, rows[0]]


def plant(count: int, **values: Any) -> Edit:
    """The first rows get these values; a value that is a function gets the row."""

    def edit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in rows[:count]:
            row.update({name: value(row) if callable(value) else value for name, value in values.items()})
        return rows

    return edit


EVERY = 10_000
LONG = {"tokens": [SECRET] * 400_000, "tags": ["O"] * 400_000}
LEAKED = ["Ann1", "Lee", "saw", "Rome1"]
OLD = datetime.datetime(1200, 1, 1)
SHORT = "minimum rows"
GARBAGE = "encoding garbage"
REPEATED = "duplicates of earlier splits"
OVERLAP = "overlap with the corpus"
BALANCE = "label balance in train"
PLANTS: list[tuple[str, str, Edit, str, str]] = [
    # source, table, what is planted, the table and name of the check that must block
    ("corpus", "train", keep(5), "train", SHORT),
    ("corpus", "train", plant(1, text=None), "train", "no nulls"),
    ("corpus", "train", plant(1, text="  "), "train", "length"),
    ("corpus", "validation", plant(EVERY, text="It tells of matter \ufffd"), "validation", GARBAGE),
    ("corpus", "validation", plant(EVERY, text="DOCUMENT 0. It tells of matter 0"), "validation", REPEATED),
    ("ner", "test", keep(19), "test", SHORT),
    ("ner", "train", plant(1, tags=None), "train", "no nulls"),
    ("ner", "train", plant(1, **LONG), "train", "length"),
    ("ner", "train", plant(1, tokens=[], tags=[]), "train", "length"),
    ("ner", "train", plant(1, tokens=[SECRET]), "train", "equal token and tag lengths"),
    ("ner", "train", plant(1, tags=["I-PER", "O", "O", "O"]), "train", "well-formed BIO"),
    ("ner", "test", plant(1, tags=["B-DATE", "O", "O", "O"]), "test", "label set"),
    ("ner", "train", plant(EVERY, tags=["B-PER", "I-PER", "O", "O"]), "labels", BALANCE),
    ("ner", "train", plant(5, tokens=[f"cafÃ© {SECRET}", "a", "b", "c"]), "train", GARBAGE),
    ("ner", "test", plant(3, tokens=LEAKED), "test", REPEATED),
    ("ner", "test", plant(EVERY, tokens=["It", "tells", "of", "matter 3 ."]), "test", OVERLAP),
    ("sentiment", "train", plant(2, id="twice"), "train", "unique ids"),
    ("sentiment", "train", plant(1, label=None), "train", "no nulls"),
    ("sentiment", "test", plant(1, label="so-so"), "test", "label set"),
    ("sentiment", "train", plant(EVERY, label="good"), "labels", BALANCE),
    ("sentiment", "train", plant(EVERY, text=lambda row: f"{SECRET} \x07 {row['id']}"), "train", GARBAGE),
    ("sentiment", "train", plant(1, time=OLD), "train", "time between 1900 and 2100"),
    ("sentiment", "validation", plant(5, text="REVIEW 0 !"), "validation", REPEATED),
    ("sentiment", "validation", plant(EVERY, text="document 3"), "validation", OVERLAP),
    ("recommendation", "items", keep(9), "items", SHORT),
    ("recommendation", "items", doubled, "items", "duplicate item ids"),
    ("recommendation", "items", plant(1, title=""), "items", "length"),
    ("recommendation", "items", plant(1, title=None), "items", "no nulls"),
    ("recommendation", "items", plant(9, description="â€œquotedâ€"), "items", GARBAGE),
    ("recommendation", "train", plant(1, item_id="gone"), "train", "unknown items"),
    ("recommendation", "train", plant(1, timestamp=1_700_000_000_000), "train", "time in seconds since 1970"),
    ("recommendation", "train", plant(1, timestamp=None), "train", "no nulls"),
    ("recommendation", "test", plant(1, timestamp=1), "test", "time order"),
    ("recommendation", "validation", plant(1, timestamp=1), "validation", "time order"),
    ("recommendation", "test", doubled, "test", "one interaction per user"),
    # the interaction that already stands in validation
    (
        "recommendation",
        "test",
        plant(EVERY, timestamp=1_700_000_003, item_id=lambda row: str((int(row["user_id"]) + 3) % 30)),
        "test",
        REPEATED,
    ),
]


@pytest.mark.parametrize(("source", "table", "edit", "where", "check"), PLANTS)
def test_planted_rows_block(place: config.Config, source: str, table: str, edit: Edit, where: str, check: str) -> None:
    change(source, table, edit)
    message = rf"^{source}: \d+ of \d+ checks failed, first .*; see reports/validation/{source}.html( and \S+)?$"
    with pytest.raises(UserError, match=message) as caught:
        validate.run(place, source)
    assert (where, check) in failed(source)
    for name, knob in suites.KNOBS.items():
        if f"first {name} of" in str(caught.value):
            assert f"; {knob} is " in str(caught.value) or "; it is empty: " in str(caught.value)
    page = (validate.REPORTS / f"{source}.html").read_text()
    assert 'class="fail"' in page
    assert SECRET not in str(caught.value) + page + json.dumps(report(source))


@pytest.mark.parametrize(
    ("source", "table", "edit", "told"),
    [
        ("recommendation", "train", plant(1, item_id="gone"), "row 1 (item gone); bring them among the items"),
        ("sentiment", "test", keep(3), "first minimum rows of test (3); validate.min_rows is 20; bring more rows; see"),
        ("recommendation", "test", keep(3), "validate.min_rows is 20; a reader of three items or more gives"),
        (
            "recommendation",
            "train",
            plant(1, timestamp=10**13),
            "; write seconds or milliseconds since 1970, or dates such",
        ),
        ("ner", "train", plant(1, tokens=[], tags=[]), "; it is empty: fill it in, or take the row out; see"),
        ("sentiment", "train", plant(1, label=None), "; fill it in, or take the row out; see reports/validation/"),
    ],
)
def test_what_blocks_is_told_with_its_fix(place: config.Config, source: str, table: str, edit: Edit, told: str) -> None:
    change(source, table, edit)
    with pytest.raises(UserError) as caught:
        validate.run(place, source)
    assert told in str(caught.value)


def test_one_label_alone_blocks(place: config.Config) -> None:
    path = config.TABLES / "sentiment" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "labels": ["good"]}))
    with pytest.raises(UserError):
        validate.run(place, "sentiment")
    assert {("labels", "at least two labels"), ("train", "label set")} <= failed("sentiment")


@pytest.mark.parametrize("source", config.SOURCES)
def test_wrong_columns_block_before_the_rest(place: config.Config, source: str) -> None:
    path = config.TABLES / source / "train.parquet"
    found = pq.read_table(path)
    tables.write(found.rename_columns(["other", *found.column_names[1:]]), path)
    with pytest.raises(UserError, match=f"{source}: 1 of 1 checks failed, first columns and types of schema"):
        validate.run(place, source)


def test_failing_rows_stand_with_their_text_in_the_ignored_file_only(place: config.Config) -> None:
    change("ner", "train", plant(1, tokens=[SECRET], tags=["I-PER"]))
    with pytest.raises(UserError):
        validate.run(place, "ner")
    lines = [json.loads(line) for line in (validate.ERRORS / "ner.jsonl").read_text().splitlines()]
    assert lines[0]["row"] == 1 and lines[0]["values"]["tokens"] == [SECRET]
    ids = [row for result in report("ner")["results"] if not result["success"] for row in result["rows"]]
    assert ids == [lines[0]["values"]["id"]]
    assert "reports/errors/" in (data_place.ROOT / ".gitignore").read_text()
    ingest.run(place, "ner")
    validate.run(place, "ner")
    assert not (validate.ERRORS / "ner.jsonl").exists()


def test_a_threshold_of_the_configuration_decides(place: config.Config) -> None:
    change("sentiment", "train", plant(30, text=lambda row: f"\ufffd {row['id']}"))
    with pytest.raises(UserError, match=r"encoding garbage of train text \(30 of \d+ rows\)"):
        validate.run(place, "sentiment")
    lenient = data_place.configured("validate.max_garbage=0.2")
    assert validate.run(lenient, "sentiment")["failed"] == 0


def test_missing_or_damaged_tables_say_what_to_run(place: config.Config) -> None:
    (config.TABLES / "corpus" / "train.parquet").unlink()
    with pytest.raises(UserError, match=r"corpus/train.parquet: not found; run `memgpt ingest corpus`"):
        validate.run(place, "ner")
    (config.TABLES / "ner" / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="data/tables/ner: damaged; run `memgpt ingest ner` again"):
        validate.run(place, "ner")


SETS = [
    ("ner", "ner/wnut17"),
    ("ner", "ner/wikigold"),
    ("ner", "ner/sec_filings"),
    ("sentiment", "sentiment/financial_phrasebank"),
    ("sentiment", "sentiment/sst2"),
    ("recommendation", "recommendation/ml_latest_small"),
]


@pytest.mark.skipif(
    not REAL, reason="set MEMGPT_REAL_DATA to a folder with ner/, sentiment/, recommendation/ and text/"
)
@pytest.mark.parametrize(("source", "path"), SETS)
def test_real_data_passes(place: config.Config, source: str, path: str) -> None:
    real = Path(REAL or "")
    settings = data_place.configured(f"data.corpus.uri={real}/text", f"data.{source}.uri={real / path}")
    snapshot.run(settings)
    for name in ("corpus", source):
        ingest.run(settings, name)
        assert validate.run(settings, name)["failed"] == 0
