"""Snapshot resolves all sources or changes nothing."""

import json
from pathlib import Path

import data_place
import pytest

from memgpt import config, sources
from memgpt.errors import UserError
from memgpt.stages import snapshot


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data_place.write_sources()


def test_the_lock_has_every_source_and_nothing_that_varies() -> None:
    metrics = snapshot.run(data_place.configured())
    text = sources.LOCK.read_text()
    lock = json.loads(text)
    assert list(lock) == sorted(config.SOURCES) and metrics["ner_files"] == 3
    assert [file["path"] for file in lock["recommendation"]["files"]] == [
        "src/shop/interactions.csv",
        "src/shop/items.csv",
    ]
    assert str(Path.cwd()) not in text
    before = sources.LOCK.stat().st_mtime_ns
    snapshot.run(data_place.configured())
    assert sources.LOCK.stat().st_mtime_ns == before


def test_new_data_changes_the_lock_of_its_source_alone() -> None:
    snapshot.run(data_place.configured())
    before = json.loads(sources.LOCK.read_text())
    with Path("src/reviews.jsonl").open("a") as stream:
        stream.write('{"text": "one more", "label": "good"}\n')
    snapshot.run(data_place.configured())
    after = json.loads(sources.LOCK.read_text())
    assert [name for name in before if before[name] != after[name]] == ["sentiment"]


def test_a_source_that_fails_leaves_the_lock_as_it_was() -> None:
    snapshot.run(data_place.configured())
    before = sources.LOCK.read_bytes()
    data_place.put("src/ner/train.conll", "Ann\tB-PER\n")
    with pytest.raises(UserError, match=r"data.sentiment.uri: nowhere: no such file or folder"):
        snapshot.run(data_place.configured("data.sentiment.uri=nowhere"))
    assert sources.LOCK.read_bytes() == before


def test_the_difference_names_what_came_and_writes_nothing() -> None:
    assert any(line.startswith("ner: source none → ") for line in snapshot.difference(data_place.configured()))
    snapshot.run(data_place.configured())
    assert snapshot.difference(data_place.configured()) == []
    before = sources.LOCK.read_bytes()
    with Path("src/reviews.jsonl").open("a") as stream:
        stream.write('{"text": "one more", "label": "good"}\n')
    data_place.put("src/ner/train-2.conll", "Ann\tB-PER\n")
    lines = snapshot.difference(data_place.configured())
    assert [line.partition(" (")[0] for line in lines] == [
        "ner: added src/ner/train-2.conll",
        "sentiment: changed src/reviews.jsonl",
    ]
    assert sources.LOCK.read_bytes() == before
