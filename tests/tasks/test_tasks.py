"""Judging: metrics against values worked out by hand or by the reference library, baselines and slices."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from memgpt.predict.words import best_path, joined_words, spans_from_tags
from memgpt.tasks import base, metric_names, ner, recommendation, sentiment, votes


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
    few = [{"input": {"text": "", "topic": f"topic {place}"}, "label": "neutral"} for place in range(100)]
    assert set(sentiment.slices([*rows, *few], Path())) == {"topic_a", "short", "long"}  # not a hundred of one text


def test_calibration_error_by_hand() -> None:
    rows = [{"input": {"text": "", "topic": None}, "label": "a"}] * 4
    answers = [("a", 0.95), ("a", 0.95), ("a", 0.55), ("b", 0.55)]
    predictions = [{"label": label, "scores": {label: score}, "topic": None} for label, score in answers]
    metrics = sentiment.metrics(rows, predictions)
    assert metrics["expected_calibration_error"] == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)
    assert sentiment.reliability(rows, predictions)[0] == pytest.approx([0.55, 0.5, 0.5])


def test_the_fitted_temperature_is_the_one_that_was_planted() -> None:
    random = np.random.default_rng(0)
    honest = random.normal(size=(4000, 3)) * 2
    labels = np.array([random.choice(3, p=np.exp(row) / np.exp(row).sum()) for row in honest])
    assert votes.fit_temperature(honest * 2.5, labels) == pytest.approx(2.5, rel=0.06)
    assert votes.fit_temperature(honest * 0.5, labels) == pytest.approx(0.5, rel=0.06)
    assert votes.fit_temperature(np.eye(3), np.arange(3)) >= 0.2


def opinions(root: Path, split: str, rows: list[tuple[str, str, str | None]]) -> None:
    table = [
        {"id": str(n), "text": text, "label": label, "topic": topic} for n, (text, label, topic) in enumerate(rows)
    ]
    put(root, "sentiment", split, table)
    (root / "sentiment/manifest.json").write_text(json.dumps({"labels": ["down", "up"]}))


@pytest.fixture
def tokenizer():
    from memgpt.model import MemGPTTokenizer

    return MemGPTTokenizer.train(["good day bad day"], 300, 1)


def small(topics: list[str] | None = None, labels: Sequence[str] = ("down", "up")):
    """A model of a few thousand weights with the labels of `opinions`."""
    import torch

    from memgpt.model import MemGPTConfig, MemGPTForSequenceClassification

    torch.manual_seed(0)
    shape = dict(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = MemGPTConfig(
        **shape, num_key_value_heads=1, memory_rows=7, memory_dim=4, topics=topics, id2label=dict(enumerate(labels))
    )
    return MemGPTForSequenceClassification(config).eval()


def test_calibration_makes_validation_likelier_and_reports_both_errors(tmp_path: Path, tokenizer) -> None:
    import torch

    random = np.random.default_rng(0)
    texts = [
        (" ".join(random.choice(["good", "bad", "day"], 4)), str(random.choice(["up", "down"]))) for _ in range(80)
    ]
    for split in ("train", "validation"):
        opinions(tmp_path, split, [(text, label, None) for text, label in texts])
    model = small()
    with torch.no_grad():  # sure of itself and no better than chance
        model.head.score.weight.mul_(300)
    found = sentiment.calibrate(model, tokenizer, tmp_path, max_length=8)
    assert model.config.label_temperature == found["temperature"] == 5
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    from memgpt import predict

    rows = sentiment.test_rows(tmp_path, "validation")
    answers = predict.load("sentiment", tmp_path / "model").predict([row["input"] for row in rows])
    after = sentiment.metrics(rows, answers)["expected_calibration_error"]
    assert after < found["expected_calibration_error_before"]


def test_rare_labels_weigh_more_and_all_weigh_one_on_average(tmp_path: Path, tokenizer) -> None:
    import torch

    opinions(tmp_path, "train", [("bad day", "down", None)] + [("good day", "up", None)] * 3)
    plain = sentiment.Training(tmp_path, tokenizer, max_length=8)
    balanced = sentiment.Training(tmp_path, tokenizer, max_length=8, class_balance=1.0)
    batch = balanced.collate([0, 1, 2, 3])
    assert batch["sample_weights"].tolist() == pytest.approx([2, 2 / 3, 2 / 3, 2 / 3])
    model = small()
    losses = torch.nn.functional.cross_entropy(model(**batch).logits, batch["labels"], reduction="none")
    assert model(**batch).loss.item() == pytest.approx(((losses[0] * 2 + losses[1:].sum() * 2 / 3) / 4).item())
    assert model(**plain.collate([0, 1, 2, 3])).loss.item() == pytest.approx(losses.mean().item())


def test_a_label_with_one_text_or_none_is_no_trouble(tmp_path: Path, tokenizer) -> None:
    """A pinned label may be missing from train."""
    texts = [("bad day", "down", None)] + [("good day", "up", None)] * 3
    for split in ("train", "validation"):
        opinions(tmp_path, split, texts)
    (tmp_path / "sentiment/manifest.json").write_text(json.dumps({"labels": ["down", "sideways", "up"]}))
    data = sentiment.Training(tmp_path, tokenizer, max_length=8, class_balance=1.0)
    assert data.collate([0, 1])["sample_weights"].tolist() == pytest.approx([2, 2 / 3])
    assert data.labels == [0, 2, 2, 2]
    model = small(labels=["down", "sideways", "up"])
    found = sentiment.calibrate(model, tokenizer, tmp_path, max_length=8)
    assert 0.2 <= found["temperature"] <= 5


def test_words_vote_where_the_deep_model_knows_nothing(tmp_path: Path, tokenizer) -> None:
    """Labels that hang on a pair of words, and one that no text of train has."""
    import torch

    from memgpt.model import MemGPTForCausalLM

    random = np.random.default_rng(0)
    texts = []
    for _ in range(120):
        words = [str(word) for word in random.choice(["good", "bad", "day"], 5)]
        texts.append((" ".join(words), "up" if "good day" in " ".join(words) else "down", None))
    opinions(tmp_path, "train", texts[:80])
    opinions(tmp_path, "validation", texts[80:])
    (tmp_path / "sentiment/manifest.json").write_text(json.dumps({"labels": ["down", "sideways", "up"]}))
    tokenizer.save_pretrained(tmp_path / "core")
    MemGPTForCausalLM(small().config).save_pretrained(tmp_path / "core")
    model = sentiment.model(tmp_path / "core", tmp_path, dropout=0.0, max_length=16, word_votes=499).eval()
    with torch.no_grad():
        model.head.score.weight.zero_()
    found = sentiment.calibrate(model, tokenizer, tmp_path, max_length=16)
    assert found["word_vote_weight"] == model.config.word_vote_weight > 1
    data = sentiment.Training(tmp_path, tokenizer, max_length=16, split="validation")
    batch = data.collate(list(range(len(data))))
    right = model(**batch).logits.argmax(-1) == batch["labels"]
    assert right.float().mean() > 0.9
    assert model.train()(**batch).logits.argmax(-1).unique().tolist() == [0]


def test_words_vote_for_tags_by_their_context(tmp_path: Path, tokenizer) -> None:
    """Who comes after Mr is a person: also one who was never seen."""
    import torch

    from memgpt.model import MemGPTForCausalLM

    def tagged(names: list[str]) -> list[dict]:
        lines = [f"so Mr {name} left and {name} said" for name in names]
        return [{"tokens": line.split(), "tags": ["O", "O", "B-PER", *"OOOO"]} for line in lines]

    for split, names in (("train", ["Ada", "Brandt", "Zork", "Yulia"]), ("validation", ["Quill", "Omar"])):
        put(tmp_path, "ner", split, tagged(names))
    (tmp_path / "ner/manifest.json").write_text(json.dumps({"labels": ["LOC", "PER"]}))
    tokenizer.save_pretrained(tmp_path / "core")
    MemGPTForCausalLM(small().config).save_pretrained(tmp_path / "core")
    model = ner.model(tmp_path / "core", tmp_path, dropout=0.0, max_length=32, word_votes=4999).eval()
    with torch.no_grad():
        model.head.score.weight.zero_()
    found = ner.calibrate(model, tokenizer, tmp_path, max_length=32)
    assert found["word_vote_weight"] == model.config.word_vote_weight > 1
    assert found["outside_bias"] == model.config.outside_bias == 0  # nothing is missed
    data = ner.Training(tmp_path, tokenizer, max_length=32, split="validation")
    batch = data.collate([0, 1])
    kept = batch["labels"] != -100
    assert torch.equal(model(**batch).logits.argmax(-1)[kept], batch["labels"][kept])


def test_entities_are_told_from_the_probability_on_that_f1_pays_for(tmp_path: Path) -> None:
    """Rare and uncertain ones: four hundred texts of one-word entities, each as probable as the model says."""
    from seqeval.metrics import f1_score

    random, tags = np.random.default_rng(0), ["O", "B-PER", "I-PER"]
    probable = random.beta(0.3, 2, size=(400, 30))
    gold = [["B-PER" if drawn else "O" for drawn in row] for row in random.random((400, 30)) < probable]
    scores = [np.log(np.stack((0.999 - row, row, np.full(30, 0.001)), axis=1).clip(1e-6)) for row in probable]

    def f1(bias: float) -> float:
        return f1_score(gold, [[tags[i] for i in best_path(row, tags, bias)] for row in scores])

    bias = ner.fit_outside_bias(scores, gold, tags)
    assert bias == pytest.approx(np.log((2 - f1(bias)) / f1(bias)), abs=0.05)
    assert f1(bias) > f1(0) + 0.1
    assert f1(bias) > max(f1(other) for other in np.linspace(0, 3, 13)) - 0.02
    sure = [np.log(np.eye(3)[[tags.index(tag) for tag in row]] + 1e-9) for row in gold]
    assert ner.fit_outside_bias(sure, gold, tags) == 0
    assert ner.fit_outside_bias(scores, [["O"] * 30] * 400, tags) == 0  # nothing to find, nothing to gain


def test_outside_is_held_back_only_where_that_surely_gains() -> None:
    """Entities told for sure, missed for sure, and doubted: with a bias, two of three doubted ones are right."""
    tags = ["O", "B-PER", "I-PER"]

    def bias(doubted: int) -> float:
        probable = [0.999] * 50 + [0.001] * 50 + [0.4] * 3 * doubted
        gold = [["B-PER"]] * (100 + 2 * doubted) + [["O"]] * doubted
        return ner.fit_outside_bias([np.log([[0.9995 - p, p, 0.0005]]) for p in probable], gold, tags)

    assert bias(doubted=1) == 0  # F1 0.658 → 0.671: may be chance
    assert bias(doubted=20) > 0.5


def test_texts_of_one_label_leave_the_votes_empty(tmp_path: Path, tokenizer) -> None:
    from memgpt.model import MemGPTForCausalLM

    opinions(tmp_path, "train", [("good day", "up", None)] * 3)
    tokenizer.save_pretrained(tmp_path / "core")
    MemGPTForCausalLM(small().config).save_pretrained(tmp_path / "core")
    model = sentiment.model(tmp_path / "core", tmp_path, dropout=0.0, max_length=8, word_votes=499)
    assert not model.word_votes.table.weight.any()


def test_votes_that_say_nothing_count_nothing() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(3, size=500)
    knows = 2.0 * np.eye(3)[labels]
    assert votes.fit_weight(knows, random.normal(size=(500, 3)), labels) < 0.2
    assert votes.fit_weight(random.normal(size=(500, 3)), knows, labels) > 5


def test_topics_are_learnt_where_enough_texts_have_them(tmp_path: Path, tokenizer) -> None:
    import torch

    few = [("good day", "up", "banking")] * 12 + [("bad day", "down", None)] * 3 + [("bad day", "down", "food")] * 2
    opinions(tmp_path, "train", few)
    assert sentiment.topics(tmp_path) is None
    assert "topics" not in sentiment.Training(tmp_path, tokenizer, max_length=8).collate([0])
    opinions(tmp_path, "train", few + [("good day", "up", "energy")] * 10)
    assert sentiment.topics(tmp_path) == ["banking", "energy"]
    data = sentiment.Training(tmp_path, tokenizer, max_length=8)
    batch = data.collate([0, 12, 15, 17])
    assert batch["topics"].tolist() == [0, -100, -100, 1]
    model = small(topics=["banking", "energy"])
    outputs = model(**batch)
    label = torch.nn.functional.cross_entropy(outputs.logits, batch["labels"])
    topic = torch.nn.functional.cross_entropy(outputs.topic_logits, batch["topics"], reduction="sum") / 4
    assert outputs.loss.item() == pytest.approx((label + topic).item())
    assert torch.isfinite(model(**data.collate([12, 13])).loss), "a batch in which no text has a topic"


def test_the_share_of_right_topics_is_reported() -> None:
    rows = [{"input": {"text": "", "topic": topic}, "label": "up"} for topic in ("a", "b", None)]
    answer = {"label": "up", "scores": {"up": 1.0}, "topic": None}
    assert sentiment.metrics(rows, [{**answer, "predicted_topic": "a"}] * 3)["topic_accuracy"] == 0.5
    assert "topic_accuracy" not in sentiment.metrics(rows, [answer] * 3)


def test_bag_of_words_learns_words(tmp_path: Path) -> None:
    train = [{"id": str(n), "text": ("good day", "bad day")[n % 2], "label": ("up", "down")[n % 2]} for n in range(20)]
    put(tmp_path, "sentiment", "train", train)
    rows = [{"input": {"text": "a good one", "topic": "t"}, "label": "up"}]
    (prediction,) = sentiment.baseline(tmp_path, rows)
    assert (prediction["label"], prediction["topic"]) == ("up", "t")
    put(tmp_path, "sentiment", "train", [row for row in train if row["label"] == "down"])
    (prediction,) = sentiment.baseline(tmp_path, rows)
    assert (prediction["label"], prediction["scores"]) == ("down", {"down": 1.0}), "all that train knows"


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


@pytest.fixture
def trained(shop: Path) -> Path:
    """An untrained model's directory with the index of a shop where a song is followed by the next one of its album."""
    from memgpt.model import MemGPTConfig, MemGPTForRecommendation, MemGPTTokenizer

    items = [{"item_id": f"i{n}", "title": f"Song {n}", "description": "", "tags": ""} for n in range(30)]
    put(shop, "recommendation", "items", items)
    splits: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for user in range(60):
        for time in range(5):
            split = "test" if time == 4 else "validation" if time == 3 else "train"
            item = f"i{(user * 7 + time) % 30}"
            splits[split].append({"user_id": f"u{user}", "item_id": item, "timestamp": time * 86400})
    for split, rows in splits.items():
        put(shop, "recommendation", split, rows)
    tokenizer = MemGPTTokenizer.train(["Song"], 300, 1)
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, memory_rows=31)
    model = MemGPTForRecommendation(MemGPTConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **shape)).eval()
    directory = shop / "model"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    recommendation.write_index(model, tokenizer, shop, directory, rerank=True, taste_epochs=30, seed=1)
    return directory


def test_ranking_by_behaviour_is_learned_beside_the_texts(shop: Path, trained: Path) -> None:
    from memgpt import predict

    predictor = predict.load("recommendation", trained)
    rows = recommendation.test_rows(shop)
    predictions = predictor.predict([row["input"] for row in rows])
    ranked = recommendation.metrics(rows, predictions)
    apart = recommendation.apart(shop, rows, predictions, predictor)
    assert predictor.index.weights["follows"] > 0
    assert ranked["ndcg_at_10"] > 0.9 > 0.5 > apart["text_ndcg_at_10"], "the texts of an untrained model say nothing"
    assert 0 < apart["coverage_at_10"] <= 1
    (stranger,) = predictor.predict([{"history": ["no known song"], "k": 3, "candidates": ["i1", "a new song"]}])
    assert {item["item_id"] for item in stranger} == {"i1", None}


def test_tastes_are_learned_from_choices_alike_every_time(shop: Path, trained: Path) -> None:
    from transformers import AutoTokenizer

    from memgpt import predict
    from memgpt.model import MemGPTForRecommendation
    from memgpt.predict.recommendation import SIGNALS

    predictor = predict.load("recommendation", trained)
    places = []
    for row in recommendation.test_rows(shop):
        history = row["input"]["history"]
        signals = predictor.signals(history)
        signals[[predictor.place[item] for item in history]] = -torch.inf
        ahead = signals > signals[predictor.place[row["item_id"]]]
        places.append(ahead.sum(0))
    by = dict(zip(SIGNALS, torch.stack(places).float().mean(0).tolist(), strict=True))
    assert by["taste"] < by["match"] / 2, "an untrained model's texts say nothing, its readers' choices do"
    before = {path.name: path.read_bytes() for path in trained.glob("*.safetensors")}
    model, tokenizer = MemGPTForRecommendation.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    recommendation.write_index(model.eval(), tokenizer, shop, trained, rerank=True, taste_epochs=30, seed=1)
    assert {path.name: path.read_bytes() for path in trained.glob("*.safetensors")} == before


def test_co_visitation_falls_with_distance_and_half_of_it_goes_back(shop: Path) -> None:
    found = recommendation.behaviour(shop)
    row = slice(found["starts"][0], found["starts"][1])
    assert found["columns"][row].tolist() == [1]  # i0, then i1, by both readers
    assert found["values"][row].tolist() == pytest.approx([2 / (2 + 3)])
    back = slice(found["starts"][1], found["starts"][2])
    assert found["values"][back].tolist() == pytest.approx([1 / (2 + 3)])
    assert found["starts"][-1] == len(found["values"])


def test_coverage_and_novelty_by_hand(shop: Path, trained: Path) -> None:
    from memgpt import predict

    predictor = predict.load("recommendation", trained)
    offered = [[{"item_id": "i1", "title": "", "score": 0.0}], [{"item_id": "i1", "title": "", "score": 0.0}]]
    rows = recommendation.test_rows(shop)[:2]
    chosen = recommendation.counts(shop)["i1"]
    apart = recommendation.apart(shop, rows, offered, predictor)
    assert apart["coverage_at_10"] == pytest.approx(1 / 30)
    assert apart["novelty_at_10"] == pytest.approx(np.log2(60 / chosen))
    nothing = recommendation.apart(shop, rows, [[] for _ in rows], predictor)  # who has read the whole catalogue
    assert (nothing["coverage_at_10"], nothing["novelty_at_10"]) == (0, 0)


def test_cold_readers_have_hardly_read(shop: Path) -> None:
    assert recommendation.slices(recommendation.test_rows(shop), shop)["cold_readers"].all()


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


def test_every_label_has_a_metric_of_its_own() -> None:
    labels = ["+1", "-1", "Positive", "positive", "non-commercial", "C++"]
    assert metric_names(labels) == ["plus1", "minus1", "positive", "positive_2", "non_commercial", "cplusplus"]


def test_a_label_that_a_slice_lacks_does_not_lower_its_score() -> None:
    rows = [{"label": label} for label in ("good", "bad", "good", "mixed")]
    cells = sentiment.statistics(rows, rows)
    assert sentiment.score(cells[:3].sum(0)) == 1
    assert sentiment.score(cells[:0].sum(0)) == 0
    missed = sentiment.statistics(rows, [{"label": "good"}] * 4)
    assert sentiment.score(missed[:3].sum(0)) == pytest.approx((0.8 + 0) / 2)  # what scikit-learn gives
