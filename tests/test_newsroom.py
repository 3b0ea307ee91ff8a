"""The generated data: its tables, that its parts agree with each other, and that it is as hard as it claims to be."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest

from memgpt.newsroom import generate, grammar, lexicon
from memgpt.newsroom.readers import LATE_DAY, OPENING
from memgpt.newsroom.tables import LABELS, Newsroom, assemble
from memgpt.newsroom.world import DAY, DAYS, YEAR_START, Dice

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "newsroom.py"
spec = importlib.util.spec_from_file_location("newsroom_benchmark", BENCHMARK)
assert spec and spec.loader
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

COLUMNS = {
    "corpus": ["id", "text", "source"],
    "ner": ["id", "tokens", "tags"],
    "sentiment": ["id", "text", "label", "topic", "time"],
    "items": ["item_id", "title", "description", "tags"],
    "interactions": ["user_id", "item_id", "timestamp", "event", "rating"],
}
SPLITS = ["train", "validation", "test"]


@pytest.fixture(scope="module")
def tiny() -> Newsroom:
    return assemble(0.05, 7)


@pytest.fixture(scope="module")
def small() -> Newsroom:
    return assemble(0.3, 7)


# --- schema and determinism


def test_tables_have_their_splits_columns_and_rows(tiny: Newsroom) -> None:
    assert {source: list(splits) for source, splits in tiny.tables.items()} == {
        "corpus": ["train", "validation"],
        "ner": SPLITS,
        "sentiment": SPLITS,
        "recommendation": ["items", "interactions"],
    }
    for source, splits in tiny.tables.items():
        for split, frame in splits.items():
            assert list(frame.columns) == COLUMNS.get(split, COLUMNS.get(source))
            assert len(frame) >= 40
            key = {"items": "item_id", "interactions": None}.get(split, "id")
            assert key is None or frame[key].is_unique
            assert not frame.drop(columns="rating", errors="ignore").isna().to_numpy().any()
    interactions = tiny.tables["recommendation"]["interactions"]
    assert interactions["user_id"].nunique() >= 60
    assert interactions["timestamp"].dtype == "int64"
    assert interactions.groupby("user_id").size().between(6, 15).all()
    assert pd.api.types.is_datetime64_dtype(tiny.tables["sentiment"]["train"]["time"])


def test_the_same_scale_and_seed_give_the_same_bytes_in_another_process(tiny: Newsroom) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import newsroom;"
        "from memgpt.newsroom import generate; print(newsroom.digest(generate(0.05, 7)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(BENCHMARK.parent)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == benchmark.digest(tiny.tables)
    assert benchmark.digest(generate(0.05, 8)) != benchmark.digest(tiny.tables)


def test_a_scale_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="scale must be larger than 0"):
        generate(0)


def test_the_generator_is_the_one_that_was_measured() -> None:
    committed = json.loads(benchmark.RESULTS.read_text())
    assert all(committed["bounds"].values())
    assert committed["sha256"] == benchmark.digest(generate()), "frozen: models were trained on the committed generator"


# --- the texts


def test_tags_are_valid_bio_and_mostly_true(small: Newsroom) -> None:
    for split, frame in small.tables["ner"].items():
        wrong = mentions = 0
        for tokens, tags, sentence in zip(frame["tokens"], frame["tags"], small.ner[split], strict=True):
            assert len(tokens) == len(tags) and tokens == list(sentence.tokens)
            for before, tag in zip(["O", *tags], tags, strict=False):
                assert re.fullmatch(r"O|[BI]-(LOC|ORG|PER|PROD)", tag)
                assert tag[0] != "I" or before[1:] == tag[1:]
            starts = [i for i, tag in enumerate(sentence.tags) if tag[0] == "B"]
            mentions += len(starts)
            wrong += sum(tags[i] != sentence.tags[i] for i in starts)
        assert 0.02 < wrong / mentions < 0.09


def test_one_name_has_several_types(small: Newsroom) -> None:
    types = defaultdict(set)
    for entity in small.world.entities:
        for form in entity.forms:
            types[form].add(entity.type)
    assert sum(len(kinds) > 1 for kinds in types.values()) > 20
    homes = [
        company for company in small.world.companies if company.home and company.forms[-1] in company.home.forms[0]
    ]
    assert homes  # places lend companies their names


@pytest.mark.parametrize("task", ["ner", "sentiment"])
def test_no_held_out_phrasing_or_strange_name_is_in_train(small: Newsroom, task: str) -> None:
    def phrasings(split: str) -> set[str]:
        return {re.sub(r"\d+", "#", text) for text in benchmark.masked(small, task, split)}

    assert not phrasings("test") & phrasings("train")
    texts = {
        split: [" ".join(tokens) for tokens in frame["tokens"]] if task == "ner" else list(frame["text"])
        for split, frame in small.tables[task].items()
    }
    every = [text for split in SPLITS for text in texts[split]]
    assert len(set(every)) == len(every)
    strange = {
        word for company in small.world.companies[len(small.world.companies) // 2 :] for word in [company.forms[-1]]
    }
    strange -= set(lexicon.ORDINARY_ROOTS)
    said = {split: {word for text in texts[split] for word in re.findall(r"\w+", text)} for split in SPLITS}
    assert not strange & said["train"]
    assert strange & said["validation"] and strange & said["test"]


def test_corpus_tells_of_strange_names_but_in_no_held_out_phrasing(small: Newsroom) -> None:
    corpus = "\n".join(text for frame in small.tables["corpus"].values() for text in frame["text"])
    assert all(company.forms[-1] in corpus for company in small.world.companies)
    test = [sentence.text for sentence in small.ner["test"]] + [
        sentence.text for _, sentence in small.sentiment["test"]
    ]
    assert not any(text in corpus for text in test)


def test_claims_mean_what_their_label_says(small: Newsroom) -> None:
    """Read by other rules than the generator's: quantity times direction times negation."""
    words = lexicon.WORDS
    value = dict.fromkeys(words["boon"], 1) | dict.fromkeys(words["bane"], -1)
    upwards = [form for name in ("up", "upped", "upping") for form in words[name]]
    downwards = [form for name in ("down", "downed", "downing") for form in words[name]]
    direction = dict.fromkeys(upwards, 1) | dict.fromkeys(downwards, -1)
    read = 0
    for event, sentence in small.sentiment["train"]:
        text = sentence.text.lower()
        found = [value[word] for word in re.findall(r"[\w-]+", text) if word in value]
        moved = [direction[word] for word in re.findall(r"[\w-]+", text) if word in direction]
        if event.mood and len(found) == len(moved) == 1:
            negated = re.search(r"did not|failed to|no longer|stopped|never", text) is not None
            assert event.mood == found[0] * moved[0] * (-1 if negated else 1), text
            read += 1
    assert read > 150


def test_in_a_contrast_the_main_clause_decides(small: Newsroom) -> None:
    dice = Dice(7, "test")
    good = next(event for event in small.world.events if event.mood == 1)
    texts = [grammar.statement(good, dice).text for _ in range(500)]
    aside = r"even though (profits|sales|orders|earnings|exports) .*(fell|dropped|declined|shrank)"
    assert any(re.search(aside, text) for text in texts)
    assert any(re.search(r"did not (fall|decline|shrink)|no longer (falling|shrinking)", text) for text in texts)


# --- the parts agree


def test_every_part_tells_of_the_same_events(small: Newsroom) -> None:
    names = {form for company in small.world.companies for form in company.forms}
    for event, sentence in small.sentiment["test"]:
        mentioned = {form for entity in event.roles.values() for form in entity.forms if form in sentence.text}
        assert mentioned and {form for form in mentioned if form in names}
    for split, frame in small.tables["sentiment"].items():
        told = small.sentiment[split]
        assert list(frame["topic"]) == [event.topic for event, _ in told]
        days = (frame["time"] - pd.Timestamp(YEAR_START, unit="s")).dt.days
        assert list(days) == [event.day for event, _ in told] and days.between(0, DAYS - 1).all()
        noise = sum(LABELS[event.mood] != label for (event, _), label in zip(told, frame["label"], strict=True))
        assert 0.01 < noise / len(frame) < 0.12
    items = small.tables["recommendation"]["items"]
    for item, title, description, tags in zip(
        small.archive.items, items["title"], items["description"], items["tags"], strict=True
    ):
        assert any(form in title for entity in item.event.roles.values() for form in entity.forms)
        assert tags == f"{item.event.topic}|{item.event.kind}"
        announced = {other.event.company for other in item.announced}
        assert any(form in description for company in announced for form in company.forms) or any(
            word in description.lower()
            for other in item.announced
            for word in (*lexicon.SECTOR[other.event.topic], *lexicon.AFFAIR[other.event.kind])
        )


def test_readers_click_items_that_are_out_once_and_mostly_what_was_announced(small: Newsroom) -> None:
    tables = small.tables["recommendation"]
    assert set(tables["interactions"]["item_id"]) <= set(tables["items"]["item_id"])
    assert not tables["interactions"].duplicated(["user_id", "item_id"]).any()
    followed = steps = 0
    for reader in small.archive.readers:
        seconds = [second for second, _ in reader.clicks]
        assert seconds == sorted(set(seconds)) and seconds[0] >= OPENING
        assert all(second >= OPENING + LATE_DAY * DAY for second, item in reader.clicks if item.late)
        for (_, last), (_, item) in zip(reader.clicks, reader.clicks[1:], strict=False):
            followed += item in last.announced
            steps += 1
        assert sum(small.archive.probabilities(reader)) == pytest.approx(1)
    assert 0.6 < followed / steps < 0.8


# --- how hard it is


def test_floors_keep_their_distance_from_the_oracle(small: Newsroom) -> None:
    measured = benchmark.measure(small)
    assert all(measured["bounds"].values()), measured


def test_a_broken_bound_fails_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    committed = json.loads(benchmark.RESULTS.read_text())
    floors = {task: dict(values) for task, values in committed["floors"].items()}
    floors["ner"]["lookup"] = 0.61 * floors["ner"]["oracle"]
    assert not all(benchmark.bounds(floors, committed["facts"]).values())
    assert not all(benchmark.bounds(committed["floors"], {**committed["facts"], "sentiment_auc": 0.6}).values())
    broken = {**committed, "bounds": benchmark.bounds(floors, committed["facts"])}
    monkeypatch.setattr(benchmark, "measure", lambda room: broken)
    monkeypatch.setattr(sys, "argv", ["newsroom.py", "--scale", "0.05"])
    assert benchmark.main() == 1
