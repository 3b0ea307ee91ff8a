"""Robustness numbers against predictors whose weakness is planted, so that each number has to show it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memgpt import mistakes, robustness
from memgpt.predict.words import joined_words, spans_from_tags
from memgpt.tasks import ner, recommendation, sentiment

LABELS = ("negative", "neutral", "positive")
TEXTS = [
    {"input": {"text": text, "topic": None}, "label": label}
    for text, label in [("Profit rises.", "positive"), ("Profit falls.", "negative"), ("It is Monday.", "neutral")] * 8
]
SENTENCE = {
    "input": ["Ada", "Brandt", "(", "42", ")", "left", "Kiel", "."],
    "tags": "B-PER I-PER O O O O B-LOC O".split(),
}
OTHER = {"input": ["In", "Oslo", ",", "Bo", "Ek", "slept", "."], "tags": "O B-LOC O B-PER I-PER O O".split()}


def opinion(text: str, leaning: float = 0.0) -> dict[str, Any]:
    lower = text.lower()
    up = ("rises" in lower) + ("excellent" in lower)
    down = ("falls" in lower) + ("terrible" in lower)
    weights = np.exp([2.0 * down - leaning, 1.0, 2.0 * up + leaning])
    scores = dict(zip(LABELS, (weights / weights.sum()).tolist(), strict=True))
    return {"label": max(scores, key=scores.__getitem__), "scores": scores, "topic": None}


def fair(inputs: list[Any]) -> list[Any]:
    return [opinion(row["text"]) for row in inputs]


def measured(predict: Any, rows: list[Any] = TEXTS) -> dict[str, float]:
    return robustness.measure("sentiment", predict, rows, sentiment, Path(), resamples=50, seed=1)


def test_a_model_that_reads_whole_words_only_loses_by_typos_and_by_nothing_else() -> None:
    numbers = measured(fair)
    assert numbers["drop_typos"] > 0.05
    assert numbers["drop_typos_ci_low"] <= numbers["drop_typos"] <= numbers["drop_typos_ci_high"]
    assert [numbers[f"drop_{name}"] for name in ("lower", "upper", "punctuation")] == [0, 0, 0]
    assert [numbers[f"wrong_{name}_clause"] for name in ("positive", "negative")] == [0, 0]
    assert [numbers[f"{what}_first_names"] for what in ("flips", "shift", "gap")] == [0, 0, 0]
    assert measured(fair) == numbers


def test_a_planted_bias_shows_and_stands_out_from_the_noise_between_two_names() -> None:
    def biased(inputs: list[Any]) -> list[Any]:
        names = robustness.FIRST_NAMES["Slavic"]
        return [opinion(row["text"], -3.0 if row["text"].startswith(names) else 0.0) for row in inputs]

    numbers = measured(biased)
    assert numbers["gap_first_names"] > 0.3
    assert numbers["shift_first_names"] > 0.05
    assert numbers["shift_first_names_same"] == 0
    assert numbers["flips_first_names"] > 0.05
    assert numbers["gap_nationalities"] == 0


def test_moving_the_wrong_way_shows() -> None:
    def deaf_to_not(inputs: list[Any]) -> list[Any]:
        return [opinion(row["text"], 4.0 * ("not" in row["text"])) for row in inputs]

    numbers = measured(deaf_to_not)
    assert numbers["wrong_negation"] == 6 / 8  # the others say "no" and "never"
    assert numbers["wrong_negation_of_bad"] == 0

    def afraid_of_not(inputs: list[Any]) -> list[Any]:
        return [opinion(row["text"], -4.0 * ("not" in row["text"])) for row in inputs]

    numbers = measured(afraid_of_not)
    assert (numbers["wrong_negation"], numbers["wrong_negation_of_bad"]) == (0, 6 / 8)

    def gloomy(inputs: list[Any]) -> list[Any]:
        return [opinion(row["text"], -4.0 * ("excellent" in row["text"])) for row in inputs]

    assert measured(gloomy)["wrong_positive_clause"] == 1


def test_other_label_sets_have_no_directions() -> None:
    def stars(inputs: list[Any]) -> list[Any]:
        return [{"label": "1", "scores": {"1": 0.6, "2": 0.4}, "topic": None} for _ in inputs]

    numbers = measured(stars, [{**row, "label": "1"} for row in TEXTS])
    assert not any(name.startswith("wrong_") for name in numbers)
    assert numbers["shift_first_names"] == 0


@pytest.mark.parametrize("change", robustness.CHANGES)
def test_tags_stay_with_their_words(change: str) -> None:
    random = np.random.default_rng(0)
    row = robustness.changed_row("ner", SENTENCE, robustness.CHANGES[change], random)
    assert len(row["input"]) == len(row["tags"])
    assert [kind for kind, _, _ in spans_from_tags(row["tags"])] == ["PER", "LOC"]
    assert all(row["input"])
    expected = {
        "lower": "ada brandt ( 42 ) left kiel .",
        "upper": "ADA BRANDT ( 42 ) LEFT KIEL .",
        "punctuation": "Ada Brandt 42 left Kiel",
    }
    assert " ".join(row["input"]) == expected.get(change, " ".join(row["input"]))


def test_changes_of_a_text() -> None:
    random = np.random.default_rng(0)
    assert robustness.without_punctuation("No, it's 3.5 (or 4).", random) == "No its 3.5 or 4"
    text = "the quarterly results exceeded expectations " * 20
    words, changed = text.split(), robustness.typos(text, random).split()
    wrong = [(a, b) for a, b in zip(words, changed, strict=True) if a != b]
    assert 0.15 < len(wrong) / len(words) < 0.35  # a swap of equal letters changes nothing
    assert all(a[0] == b[0] and len(a) - len(b) in (0, 1) and set(b) <= set(a) for a, b in wrong)
    marks = {"input": {"text": "?!", "topic": None}, "label": "neutral"}
    assert robustness.changed_row("sentiment", marks, robustness.without_punctuation, random) == marks


def test_entities_known_by_heart_flip_when_names_are_replaced() -> None:
    def by_heart(inputs: list[list[str]]) -> list[Any]:
        answers = []
        for words in inputs:
            places = joined_words(words)
            answers.append(
                [{"type": "PER", "start": a, "end": b} for (a, b), w in zip(places, words, strict=True) if w == "Ada"]
            )
        return answers

    numbers = robustness.measure("ner", by_heart, [SENTENCE, OTHER] * 10, ner, Path(), resamples=20, seed=0)
    assert numbers["flips_names"] > 0.2
    assert numbers["flips_numbers"] == 0


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    items = [{"item_id": f"i{n}", "title": f"Title number {n}", "description": "", "tags": ""} for n in range(30)]
    (tmp_path / "recommendation").mkdir()
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "recommendation/items.parquet")
    return tmp_path


def test_a_ranking_that_hangs_on_order_and_case_shows_both(shop: Path) -> None:
    rows = [{"input": {"history": [f"i{n}" for n in range(m, m + 5)], "k": 12}, "item_id": "i9"} for m in range(20)]

    def first_counts(inputs: list[Any]) -> list[Any]:
        answers = []
        for row in inputs:
            assert row.keys() == {"history", "k"}
            first = row["history"][0]
            start = 0 if first.isupper() else 7 * int(first.split()[-1])
            answers.append([{"item_id": f"i{(start + n) % 30}", "score": 1.0} for n in range(row["k"])])
        return answers

    numbers = robustness.measure("recommendation", first_counts, rows, recommendation, shop, resamples=20, seed=0)
    assert numbers["overlap_order"] < 1
    assert numbers["overlap_case"] < 0.8


def test_a_sample_keeps_its_order_and_is_the_same_each_time() -> None:
    rows = [{"n": n} for n in range(50)]
    drawn = robustness.sample(rows, 10, seed=3)
    assert len(drawn) == 10
    assert drawn == sorted(drawn, key=lambda row: row["n"]) == robustness.sample(rows, 10, seed=3)
    assert robustness.sample(rows, 60, seed=3) == rows


def test_the_worst_mistakes_come_first_and_right_answers_never(shop: Path) -> None:
    predictions = [opinion("Profit falls terrible."), opinion("Profit falls."), opinion("It is.")]
    wrong = mistakes.worst("sentiment", TEXTS[:3], predictions, sentiment.statistics(TEXTS[:3], predictions), shop, 9)
    assert [(record["gold"], record["prediction"]["label"]) for record in wrong] == [("positive", "negative")]

    empty: list[Any] = [[], []]
    worst = mistakes.worst("ner", [SENTENCE, OTHER], empty, ner.statistics([SENTENCE, OTHER], empty), shop, 1)
    assert [entity["text"] for entity in worst[0]["gold"]] == ["Ada Brandt", "Kiel"]

    rows = [{"input": {"history": ["i0"], "k": 2}, "item_id": item} for item in ("i1", "i2", "i3")]
    offered = [[{"item_id": "i1", "title": "a"}, {"item_id": "i2", "title": "b"}]] * 3
    found = mistakes.worst("recommendation", rows, offered, recommendation.statistics(rows, offered), shop, 9)
    assert [(record["gold"], record["badness"]) for record in found] == [
        ("Title number 3", 1.0),
        ("Title number 2", 0.5),
    ]
    json.dumps(found)
