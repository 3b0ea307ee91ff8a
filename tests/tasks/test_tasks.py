"""Judging: metrics against values worked out by hand or by the reference library, baselines and slices."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memgpt.predict.words import joined_words, spans_from_tags
from memgpt.tasks import base, ner, recommendation, sentiment


def put(root: Path, source: str, table: str, rows: list[dict]) -> None:
    (root / source).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), root / source / f"{table}.parquet")


def answer(words: list[str], tags: list[str]) -> list[dict]:
    places = joined_words(words)
    return [
        {"text": "", "type": kind, "score": 1.0, "start": places[first][0], "end": places[last - 1][1]}
        for kind, first, last in spans_from_tags(tags)
    ]


def test_ner_f1_is_seqevals() -> None:
    from seqeval.metrics import f1_score

    random = np.random.default_rng(0)
    names = ["O", "O", "B-PER", "I-PER", "B-LOC"]
    rows, predictions, found = [], [], []
    for _ in range(50):
        words = [f"w{n}" for n in range(random.integers(1, 9))]

        def draw(words=words):
            tags, before = [], "O"
            for tag in random.choice(names, len(words)):
                before = "O" if tag == "I-PER" and before not in ("B-PER", "I-PER") else str(tag)
                tags.append(before)
            return tags

        gold, mine = draw(), draw()
        rows.append({"input": words, "tags": gold})
        predictions.append(answer(words, mine))
        found.append(mine)
    metrics = ner.metrics(rows, predictions)
    assert metrics["f1"] == pytest.approx(f1_score([row["tags"] for row in rows], found))
    assert {"precision", "recall", "macro_f1", "f1_per", "f1_loc"} < set(metrics)
    assert {"PER", "LOC", "O"} == {row["actual"] for row in ner.picture(rows, predictions)}


def test_a_test_set_without_entities_has_numbers() -> None:
    metrics = ner.metrics([{"input": ["so"], "tags": ["O"]}], [[]])
    assert (metrics["f1"], metrics["macro_f1"]) == (0, 0)


def test_gazetteer_takes_the_longest_match_with_its_usual_type(tmp_path: Path) -> None:
    put(
        tmp_path,
        "ner",
        "train",
        [
            {"id": "1", "tokens": ["New", "York", "rose"], "tags": ["B-LOC", "I-LOC", "O"]},
            {"id": "2", "tokens": ["York", "fell"], "tags": ["B-PER", "O"]},
            {"id": "3", "tokens": ["York", "fell"], "tags": ["B-PER", "O"]},
            {"id": "4", "tokens": ["York", "fell"], "tags": ["B-ORG", "O"]},
        ],
    )
    rows = [
        {"input": ["In", "New", "York", "York", "fell"], "tags": ["O", "B-LOC", "I-LOC", "B-PER", "O"]},
        {"input": ["Ada", "fell"], "tags": ["B-PER", "O"]},
    ]
    predictions = ner.baseline(tmp_path, rows)
    assert [[e["type"] for e in p] for p in predictions] == [["LOC", "PER"], []]
    assert ner.score(ner.statistics(rows, predictions).sum(0)) == pytest.approx(2 * 2 / (2 + 3))
    slices = ner.slices(rows, tmp_path)
    assert slices["unseen"].tolist() == [False, True]
    assert slices["rare"].tolist() == [True, False]  # train has New York once
    assert (slices["short"].tolist(), slices["long"].tolist()) == ([False, True], [True, False])
    assert all(len(chosen) == 0 for chosen in ner.slices([], tmp_path).values())


def test_sentiment_macro_f1_is_sklearns() -> None:
    from sklearn.metrics import f1_score

    random = np.random.default_rng(0)
    names = ["negative", "neutral", "positive"]
    gold, mine = random.choice(names, 200), random.choice([*names, "unheard of"], 200)
    rows = [{"input": {"text": "", "topic": t}, "label": str(g)} for g, t in zip(gold, ["a", None] * 100, strict=True)]
    predictions = [{"label": str(m), "scores": {str(m): 0.5}, "topic": None} for m in mine]
    expected = f1_score(gold, mine, labels=names, average="macro")
    assert sentiment.metrics(rows, predictions)["macro_f1"] == pytest.approx(expected)
    slices = sentiment.slices([*rows, {"input": {"text": "longer", "topic": None}, "label": "neutral"}], Path())
    assert (slices["topic_a"].sum(), slices["short"].sum(), slices["long"].sum()) == (100, 200, 1)


def test_calibration_error_by_hand() -> None:
    rows = [{"input": {"text": "", "topic": None}, "label": "a"}] * 4
    answers = [("a", 0.95), ("a", 0.95), ("a", 0.55), ("b", 0.55)]
    predictions = [{"label": label, "scores": {label: score}, "topic": None} for label, score in answers]
    metrics = sentiment.metrics(rows, predictions)
    assert metrics["expected_calibration_error"] == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)
    assert sentiment.reliability(rows, predictions)[0] == pytest.approx([0.55, 0.5, 0.5])


def test_bag_of_words_learns_words(tmp_path: Path) -> None:
    train = [{"id": str(n), "text": ("good day", "bad day")[n % 2], "label": ("up", "down")[n % 2]} for n in range(20)]
    put(tmp_path, "sentiment", "train", train)
    rows = [{"input": {"text": "a good one", "topic": "t"}, "label": "up"}]
    (prediction,) = sentiment.baseline(tmp_path, rows)
    assert (prediction["label"], prediction["topic"]) == ("up", "t")


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    items = [{"item_id": f"i{n}", "title": f"Title {n}", "description": "", "tags": ""} for n in range(6)]
    put(tmp_path, "recommendation", "items", items)
    read = {"ann": ["i0", "i1", "i2", "i3"], "bob": ["i0", "i1", "i4", "i5"]}
    splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for user, line in read.items():
        for time, item in enumerate(line):
            split = "test" if time == 3 else "validation" if time == 2 else "train"
            splits[split].append({"user_id": user, "item_id": item, "timestamp": time, "event": None, "rating": None})
    for split, rows in splits.items():
        put(tmp_path, "recommendation", split, rows)
    return tmp_path


def test_recommendation_rows_hold_all_that_came_before(shop: Path) -> None:
    assert recommendation.test_rows(shop)[0] == {
        "input": {"history": ["i0", "i1", "i2"], "k": recommendation.DEPTH},
        "item_id": "i3",
    }
    assert recommendation.test_rows(shop, "validation")[1]["input"]["history"] == ["i0", "i1"]


def test_ndcg_recall_and_mrr_by_hand(shop: Path) -> None:
    rows = recommendation.test_rows(shop)
    ranked = [[{"item_id": i, "title": "", "score": 0.0} for i in order] for order in (["i4", "i3"], ["i0"])]
    metrics = recommendation.metrics(rows, ranked)
    assert metrics["ndcg_at_10"] == pytest.approx(0.5 / np.log2(3))
    assert (metrics["recall_at_1"], metrics["recall_at_10"], metrics["mrr_at_50"]) == (0, 0.5, 0.25)


def test_popularity_leaves_out_what_was_read(shop: Path) -> None:
    rows = recommendation.test_rows(shop)
    offered = [[item["item_id"] for item in p] for p in recommendation.baseline(shop, rows)]
    assert offered == [["i3", "i4", "i5"], ["i2", "i3", "i5"]]
    assert recommendation.slices(rows, shop)["cold"].all()


def test_base_score_is_bits_over_bytes_and_the_trigrams_beat_chance(tmp_path: Path) -> None:
    text = "the bank fell and the bank rose again. " * 50
    put(tmp_path, "corpus", "train", [{"id": "1", "text": text, "source": ""}])
    put(tmp_path, "corpus", "validation", [{"id": "2", "text": text[:200], "source": ""}])
    rows = base.test_rows(tmp_path)
    assert rows == [{"input": text[:200]}]
    predictions = base.baseline(tmp_path, rows)
    assert -2.0 < base.score(base.statistics(rows, predictions).sum(0)) < -0.2
    two = [{"bits_per_byte": 2.0, "bytes": 10}, {"bits_per_byte": 4.0, "bytes": 30}]
    assert base.score(base.statistics([], two).sum(0)) == pytest.approx(-3.5)


def test_ner_training_rows_label_first_subwords_only(tmp_path: Path) -> None:
    from memgpt.model import MemGPTTokenizer

    tokenizer = MemGPTTokenizer.train(["a b"], 300, 1)  # every longer word falls into letters
    put(tmp_path, "ner", "train", [{"id": "1", "tokens": ["Ada", "fell"], "tags": ["B-PER", "O"]}])
    (tmp_path / "ner/manifest.json").write_text(json.dumps({"labels": ["PER"]}))
    data = ner.Training(tmp_path, tokenizer, max_length=64)
    batch = data.collate([data[0]])
    labels = batch["labels"][0].tolist()
    assert [label for label in labels if label != -100] == [1, 0]
    assert labels[0] == 1
    assert batch["input_ids"].shape == batch["labels"].shape


def test_readers_of_one_item_each_give_nothing_to_learn_from(shop: Path) -> None:
    from memgpt.model import MemGPTTokenizer

    one_each = [
        {"user_id": user, "item_id": "i0", "timestamp": 0, "event": None, "rating": None} for user in ("ann", "bob")
    ]
    put(shop, "recommendation", "train", one_each)
    tokenizer = MemGPTTokenizer.train(["Title"], 300, 1)
    assert len(recommendation.Training(shop, tokenizer, max_length=8, max_history=4)) == 0
