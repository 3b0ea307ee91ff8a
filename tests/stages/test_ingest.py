"""Ingest turns exactly the locked content into tables, the same bytes every time, all of them or none."""

import json
from pathlib import Path

import data_place
import pyarrow.parquet as pq
import pytest

from memgpt import config, tables
from memgpt.errors import UserError
from memgpt.stages import ingest, snapshot


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data_place.write_sources()
    snapshot.run(data_place.configured())


def manifest(source: str) -> dict:
    return json.loads((config.TABLES / source / "manifest.json").read_text())


def contents(source: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((config.TABLES / source).iterdir())}


def test_every_source_becomes_its_tables() -> None:
    settings = data_place.configured()
    rows = {source: ingest.run(settings, source) for source in config.SOURCES}
    assert rows["ner"] == {"train_rows": 40, "validation_rows": 25, "test_rows": 25}
    assert rows["recommendation"] == {"items_rows": 30, "train_rows": 75, "validation_rows": 25, "test_rows": 25}
    assert sum(rows["sentiment"].values()) == 400 and sum(rows["corpus"].values()) == 200
    for source in ("corpus", "ner", "sentiment"):
        for split in manifest(source)["rows"]:
            found = pq.read_table(config.TABLES / source / f"{split}.parquet")
            assert found.schema.equals(tables.SCHEMAS[source]) and found.num_rows == manifest(source)["rows"][split]
    assert manifest("ner")["labels"] == ["LOC", "PER"] and manifest("corpus")["labels"] is None
    assert manifest("sentiment") == {
        "source": "src/reviews.jsonl",
        "family": "file:src/reviews.jsonl",
        "licence": None,
        "non_commercial": False,
        "labels": ["bad", "good"],
        "files": {"src/reviews.jsonl": Path("src/reviews.jsonl").stat().st_size},
        "rows": {"train": 319, "validation": 40, "test": 41},
        "columns": {"text": "text", "label": "label", "time": "time"},
    }


@pytest.mark.parametrize("source", config.SOURCES)
def test_the_same_content_gives_the_same_bytes(source: str) -> None:
    settings = data_place.configured()
    ingest.run(settings, source)
    before = contents(source)
    (config.TABLES / source / "stale.parquet").write_bytes(b"of an older run")
    ingest.run(settings, source)
    assert contents(source) == before


def test_content_that_is_not_the_locked_one_leaves_the_old_tables() -> None:
    settings = data_place.configured()
    ingest.run(settings, "sentiment")
    before = contents("sentiment")
    with Path("src/reviews.jsonl").open("a") as stream:
        stream.write('{"text": "one more", "label": "good"}\n')
    with pytest.raises(
        UserError, match=r"src/reviews.jsonl: changed since the snapshot of sentiment; run `memgpt snapshot`"
    ):
        ingest.run(settings, "sentiment")
    with pytest.raises(
        UserError, match=r"data.ner.uri is other but data/sources.lock.json has src/ner; run `memgpt snapshot`"
    ):
        ingest.run(data_place.configured("data.ner.uri=other"), "ner")
    assert contents("sentiment") == before


def test_a_bad_row_is_named_and_nothing_is_written() -> None:
    data_place.put("src/ner/train.conll", "Ann\tB-PER\nsaw\tO\nRome\tI-LOC\n")
    snapshot.run(data_place.configured())
    with pytest.raises(UserError, match=r"src/ner/train.conll line 3: broken BIO: I-LOC follows O") as caught:
        ingest.run(data_place.configured(), "ner")
    assert "Rome" not in str(caught.value) and not (config.TABLES / "ner").exists()


def test_the_licence_comes_from_the_configuration_the_folder_or_the_rows() -> None:
    data_place.put("src/ner/LICENSE", "Creative Commons Attribution 4.0")
    data_place.jsonl("src/more.jsonl", [{"text": f"t {n}", "license": "CC-BY-NC-4.0"} for n in range(200)])
    settings = data_place.configured("data.corpus.uri=src/more.jsonl", "data.sentiment.licence=CC-BY-NC-SA-3.0")
    snapshot.run(settings)
    for source in ("corpus", "ner", "sentiment"):
        ingest.run(settings, source)
    found = {
        source: (manifest(source)["licence"], manifest(source)["non_commercial"])
        for source in ("corpus", "ner", "sentiment")
    }
    expected = {"corpus": ("CC-BY-NC-4.0", True), "ner": ("CC-BY-4.0", False), "sentiment": ("CC-BY-NC-SA-3.0", True)}
    assert found == expected


def test_the_embedded_data_is_ingested_as_locked() -> None:
    settings = data_place.configured(*(f'data.{source}.uri="sample://newsroom?scale=0.1"' for source in config.SOURCES))
    snapshot.run(settings)
    for source in config.SOURCES:
        assert ingest.run(settings, source)["train_rows"] > 0
        assert manifest(source)["family"] == "sample:newsroom"
