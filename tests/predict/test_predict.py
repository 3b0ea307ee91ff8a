"""The prediction formats, on models that know nothing: places, batching and windows must be right all the same."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.modeling_outputs import TokenClassifierOutput

from memgpt import predict
from memgpt.model import (
    MemGPTConfig,
    MemGPTForCausalLM,
    MemGPTForRecommendation,
    MemGPTForSequenceClassification,
    MemGPTForTokenClassification,
    MemGPTTokenizer,
)
from memgpt.predict import words
from memgpt.predict.batching import by_length
from memgpt.predict.recommendation import build_index
from memgpt.tables import bio_error

TEXT = "Ada Brandt of Norvale Systems fell in Port Dunham, said the bank."
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """A tokenizer and a configuration of a few thousand weights."""
    tokenizer = MemGPTTokenizer.train([TEXT] * 4, 320, 1)
    settings = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        memory_rows=31,
        memory_dim=4,
        initializer_range=0.5,
    )
    return tokenizer, settings


def made(shape, kind, directory, **changes):
    tokenizer, settings = shape
    torch.manual_seed(3)
    model = kind(MemGPTConfig(**settings, **changes)).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def tagger(shape, directory, **changes):
    return made(shape, MemGPTForTokenClassification, directory, id2label=dict(enumerate(TAGS)), **changes)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Don't pay $3.50, U.S. co-op!", ["Don't", "pay", "$", "3.50", ",", "U.S", ".", "co-op", "!"]),
        ("我爱北京 IBM公司", ["我", "爱", "北", "京", "IBM", "公", "司"]),
        ("   ", []),
        ("Rene\u0301e fell", ["Rene\u0301e", "fell"]),
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा", "।"]),
        ("\ufeffAda\u200b fell\u00ad \u200b.", ["Ada", "fell", "."]),
    ],
)
def test_words_of_a_text(text: str, expected: list[str]) -> None:
    assert [text[a:b] for a, b in words.split_words(text)] == expected


def test_spans_from_tags_mend_what_continues_nothing() -> None:
    tags = ["I-PER", "I-PER", "O", "B-LOC", "B-LOC", "I-PER", "I-LOC"]
    assert words.spans_from_tags(tags) == [
        ("PER", 0, 2),
        ("LOC", 3, 4),
        ("LOC", 4, 5),
        ("PER", 5, 6),
        ("LOC", 6, 7),
    ]


@pytest.mark.parametrize("outside_bias", [0.0, 1.5])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_best_path_is_the_best_of_all_well_formed_ones(count: int, outside_bias: float) -> None:
    random = np.random.default_rng(count)
    less = outside_bias * np.array([tag == "O" for tag in TAGS])
    for _ in range(20):
        scores = np.log(random.dirichlet(np.ones(len(TAGS)), size=count))
        well_formed = [
            path
            for path in itertools.product(range(len(TAGS)), repeat=count)
            if bio_error([TAGS[label] for label in path]) is None
        ]
        best = max(well_formed, key=lambda path: (scores - less)[range(count), path].sum())
        assert words.best_path(scores, TAGS, outside_bias) == list(best)


class _Reader(torch.nn.Module):
    """Tags "Ada Brandt Norvale": the last two only where the window shows the name from its beginning."""

    def __init__(self, config, name):
        super().__init__()
        self.config, self.name, self.device, self.dtype = config, name, torch.device("cpu"), torch.float32

    def forward(self, input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, len(TAGS))
        logits[..., 0] = 1.0
        for row, ids in enumerate(input_ids.tolist()):
            for place in range(len(ids)):
                if ids[place : place + 1] == self.name[:1]:
                    logits[row, place, 1] = 9.0
                elif any(ids[place - back : place + 1] == self.name[: back + 1] for back in (1, 2) if back <= place):
                    logits[row, place, 2] = 9.0
        return TokenClassifierOutput(logits=logits)


@pytest.mark.parametrize("before", range(24))
def test_no_entity_is_lost_or_cut_where_windows_meet(shape, tmp_path, before: int) -> None:
    """The entity stands at every place relative to the windows' edges."""
    tagger(shape, tmp_path, window=12)
    predictor = predict.load("ner", tmp_path)
    name, filler = "Ada Brandt Norvale", "of"
    pieces = words.encode_words(predictor.tokenizer, [*name.split(), filler])
    assert [len(piece) for piece in pieces] == [1, 1, 1, 1]
    predictor.model = _Reader(predictor.model.config, [ids[0] for ids in pieces[:3]])
    text = " ".join([*[filler] * before, name, *[filler] * 30])
    (found,) = predictor.predict([text])
    assert [(entity["text"], entity["type"]) for entity in found] == [(name, "PER")]


def test_an_entity_longer_than_the_window_stays_whole(shape, tmp_path) -> None:
    tagger(shape, tmp_path, window=12)
    predictor = predict.load("ner", tmp_path)
    model = predictor.model
    with torch.no_grad():  # every word is the inside of a person: only the first can begin it
        model.head.score.weight.zero_()
        model.head.score.bias.copy_(torch.tensor([0.0, 1.0, 2.0, 0.0, 0.0]))
    text = "Ada " * 40
    (found,) = predictor.predict([text])
    assert [(entity["start"], entity["end"], entity["type"]) for entity in found] == [(0, len(text) - 1, "PER")]


def test_ner_places_are_those_of_the_text(shape, tmp_path) -> None:
    tagger(shape, tmp_path)
    predictor = predict.load("ner", tmp_path)
    running, split, nothing = predictor.predict([TEXT, TEXT.split(" "), ""])
    assert nothing == []
    assert running, "an untrained model tags something"
    for entity in [*running, *split]:
        assert set(entity) == {"text", "type", "score", "start", "end"}
        assert TEXT[entity["start"] : entity["end"]] == entity["text"]
        assert entity["type"] in {"PER", "LOC"}
        assert 0 < entity["score"] <= 1


def test_ner_answers_do_not_depend_on_company(shape, tmp_path) -> None:
    tagger(shape, tmp_path)
    predictor = predict.load("ner", tmp_path)
    texts = [TEXT, "Ada", "the bank fell in Port", ""] * 3
    alone = [predictor.predict([text])[0] for text in texts]
    together = predictor.predict(texts)
    for one, other in zip(alone, together, strict=True):
        assert [(e["start"], e["end"], e["type"]) for e in one] == [(e["start"], e["end"], e["type"]) for e in other]


def test_a_long_text_is_read_to_its_end(shape, tmp_path) -> None:
    tagger(shape, tmp_path, window=16)
    predictor = predict.load("ner", tmp_path)
    found = predictor.predict([" ".join([TEXT] * 20)])[0]
    assert max(entity["end"] for entity in found) > len(TEXT) * 19


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_windows_cover_every_word_and_overlap(size: int) -> None:
    lengths = [2, 1, 3, 1, 1, 2, 5, 1, 1, 1]
    ranges = words.windows(lengths, size)
    assert {word for first, last in ranges for word in range(first, last)} == set(range(10))
    for first, last in ranges:
        assert last - first == 1 or sum(lengths[first:last]) <= size


def test_sentiment_keeps_the_topic(shape, tmp_path) -> None:
    names = {0: "negative", 1: "neutral", 2: "positive"}
    made(shape, MemGPTForSequenceClassification, tmp_path, id2label=names)
    plain, with_topic = predict.load("sentiment", tmp_path).predict([TEXT, {"text": "", "topic": "banking"}])
    assert plain["topic"] is None
    assert with_topic["topic"] == "banking"
    for answer in (plain, with_topic):
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert answer["label"] == max(answer["scores"], key=answer["scores"].get)


def test_sentiment_predicts_the_topics_that_it_learnt(shape, tmp_path) -> None:
    names = {0: "negative", 1: "positive"}
    model = made(shape, MemGPTForSequenceClassification, tmp_path, id2label=names, topics=["banking", "energy", "food"])
    with torch.no_grad():
        model.head.topic.weight.zero_()
        model.head.topic.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    model.save_pretrained(tmp_path)
    answers = predict.load("sentiment", tmp_path).predict([TEXT, {"text": TEXT, "topic": "food"}])
    assert [(answer["topic"], answer["predicted_topic"]) for answer in answers] == [
        (None, "energy"),
        ("food", "energy"),
    ]


def test_the_label_temperature_is_saved_and_softens_the_scores(shape, tmp_path) -> None:
    model = made(shape, MemGPTForSequenceClassification, tmp_path, num_labels=3)
    (sharp,) = predict.load("sentiment", tmp_path).predict([TEXT])
    model.config.label_temperature = 2.0
    model.save_pretrained(tmp_path)
    (soft,) = predict.load("sentiment", tmp_path).predict([TEXT])
    expected = np.sqrt(list(sharp["scores"].values()))
    assert list(soft["scores"].values()) == pytest.approx(expected / expected.sum(), abs=1e-4)
    assert "predicted_topic" not in soft


LONG = "Ada Brandt of Norvale Systems fell. " * 2778  # 100,000 characters


@pytest.mark.parametrize("text", ["", "   ", LONG])
def test_empty_and_very_long_texts_get_an_answer_of_their_own(shape, tmp_path, text: str) -> None:
    made(shape, MemGPTForSequenceClassification, tmp_path / "sentiment", num_labels=3)
    tagger(shape, tmp_path / "ner")
    labelled = predict.load("sentiment", tmp_path / "sentiment").predict([TEXT, text, TEXT])
    assert labelled[0]["scores"] == pytest.approx(labelled[2]["scores"], abs=1e-5)
    assert sum(labelled[1]["scores"].values()) == pytest.approx(1, abs=1e-5)
    tagged = predict.load("ner", tmp_path / "ner").predict([TEXT, text, TEXT])
    assert [entity["text"] for entity in tagged[0]] == [entity["text"] for entity in tagged[2]]
    if text.strip():
        assert tagged[1][-1]["end"] > len(text) - len("Ada Brandt of Norvale Systems fell. ")
    else:
        assert tagged[1] == []


def test_base_counts_bits_over_windows(shape, tmp_path, monkeypatch) -> None:
    from memgpt.predict import base

    model = made(shape, MemGPTForCausalLM, tmp_path)
    tokenizer = shape[0]
    (answer,) = predict.load("base", tmp_path).predict([TEXT])
    (control,) = predict.load("base", tmp_path).predict(["<pad><end>"])
    assert control["tokens"] > 2, "a text cannot smuggle in control tokens"
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(TEXT)["input_ids"]]])
    expected = model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert answer["nats"] == pytest.approx(expected, rel=1e-5)
    assert answer["bytes"] == len(TEXT)
    monkeypatch.setattr(base, "WINDOW", 5)
    (windowed,) = predict.load("base", tmp_path).predict([TEXT])
    assert windowed["tokens"] == answer["tokens"] == ids.shape[1] - 1


@pytest.fixture
def shop(shape, tmp_path):
    tokenizer = shape[0]
    model = made(shape, MemGPTForRecommendation, tmp_path, max_history=3)
    items = [
        {"item_id": f"i{n}", "title": f"{word} of Port", "description": "", "tags": ""}
        for n, word in enumerate(["Ada", "Brandt", "Norvale", "Systems", "bank"])
    ]
    build_index(model, tokenizer, items, {"i3": 7, "i1": 2}, tmp_path)
    return tmp_path


def test_recommendation_ranks_the_catalogue_less_what_was_read(shop) -> None:
    answers = predict.load("recommendation", shop).predict([{"history": ["i0", "i2"], "k": 10}])[0]
    assert {answer["item_id"] for answer in answers} == {"i1", "i3", "i4"}
    scores = [answer["score"] for answer in answers]
    assert scores == sorted(scores, reverse=True)
    assert answers[0]["title"].endswith("of Port")


def test_recommendation_takes_items_it_never_saw(shop) -> None:
    query = {"history": ["Systems of the bank", "i1"], "k": 2, "candidates": ["i0", "a new thing in Port Dunham"]}
    answers = predict.load("recommendation", shop).predict([query])[0]
    assert {(a["item_id"], a["title"]) for a in answers} == {
        ("i0", "Ada of Port"),
        (None, "a new thing in Port Dunham"),
    }


def test_candidates_compete_as_given_each_once(shop) -> None:
    query = {"history": ["i0"], "k": 9, "candidates": ["i0", "i1", "i0", "Ada in Port", "Ada in Port"]}
    answers = predict.load("recommendation", shop).predict([query])[0]
    assert sorted(answer["item_id"] or "" for answer in answers) == ["", "i0", "i1"]


def test_a_reader_without_history_gets_what_most_chose(shop) -> None:
    for nothing in ([], ["", "  "]):
        answers = predict.load("recommendation", shop).predict([{"history": nothing, "k": 2}])[0]
        assert [answer["item_id"] for answer in answers] == ["i3", "i1"]


def test_the_item_index_is_no_pickle_and_can_be_renewed(shop, shape) -> None:
    assert load_file(shop / "items.safetensors")["vectors"].shape == (5, 64)
    assert json.loads((shop / "items.json").read_text())["counts"] == [0, 2, 0, 7, 0]
    renewed = shop.parent / "renewed"
    shutil.copytree(shop, renewed)
    model = MemGPTForRecommendation.from_pretrained(shop)
    build_index(model, shape[0], [{"item_id": "x", "title": "Ada", "description": "", "tags": "a|b"}], {}, renewed)
    assert predict.load("recommendation", renewed).predict([{"history": ["Ada"], "k": 3}])[0][0]["item_id"] == "x"
    shutil.rmtree(renewed)


def test_new_items_are_added_without_training(shop, tmp_path, monkeypatch) -> None:
    """`memgpt index`: what is there stays bit for bit, what arrives can be recommended."""
    from typer.testing import CliRunner

    from memgpt import cli

    monkeypatch.setattr(cli.models, "compute_with", lambda config: None)
    before = load_file(shop / "items.safetensors")["vectors"]
    weights = (shop / "model.safetensors").read_bytes()
    new = tmp_path.parent / "new-items.csv"
    new.write_text("item_id,title,tags\ni1,another text,\nx,Norvale Systems of the bank,a|b\n")
    done = CliRunner().invoke(cli.app, ["index", str(shop), str(new)])
    assert "1 items added, 1 known already" in done.output
    after = load_file(shop / "items.safetensors")["vectors"]
    assert torch.equal(after[:5], before)
    assert (shop / "model.safetensors").read_bytes() == weights
    text = "Norvale Systems of the bank a, b"
    offered, as_text = predict.load("recommendation", shop).predict(
        [{"history": ["i0"]}, {"history": ["i0"], "candidates": [text]}]
    )
    scores = {item["item_id"]: (item["title"], item["score"]) for item in offered}
    assert scores["x"] == ("Norvale Systems of the bank", as_text[0]["score"])
    again = CliRunner().invoke(cli.app, ["index", str(shop), str(new)])
    assert "0 items added, 2 known already" in again.output


def test_batches_hold_every_row_once_and_respect_their_size() -> None:
    rows = [[0] * n for n in (5, 1, 9, 3, 3, 40, 0)]
    batches = list(by_length(rows, tokens=12))
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(rows[row]) for row in batch) <= 12
