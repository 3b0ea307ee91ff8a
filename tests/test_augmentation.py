"""Augmented rows: the old ones stay, the new ones are well formed and their labels still hold."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from memgpt import augmentation
from memgpt.errors import UserError
from memgpt.model import MemGPTTokenizer
from memgpt.predict.words import spans_from_tags

NAMES = [
    {"tokens": "Ann Lee met Bob in Rome .".split(), "tags": "B-PER I-PER O B-PER O B-LOC O".split()},
    {"tokens": "shares of Acme Corp fell".split(), "tags": "O O B-ORG I-ORG O".split()},
    {"tokens": "it rained all day".split(), "tags": "O O O O".split()},
]
TEXTS = [
    {"text": "profit rose by a third this year", "label": "positive", "topic": "a"},
    {"text": "sales went up in all regions", "label": "positive", "topic": "b"},
    {"text": "the plant will close in May", "label": "negative", "topic": None},
]


def no_synonyms() -> augmentation.Synonyms:
    raise AssertionError("not asked for")


@pytest.mark.parametrize("kind", ["mention_replacement", "word_edits", "letter_case", "recombination", "synonyms"])
def test_names_keep_their_type(kind: str) -> None:
    known = {"met": ["saw"], "fell": ["sank"], "rained": ["snowed"], "in": ["near"]}
    rows = augmentation.ner(NAMES, 1, lambda: known, **{kind: 20.0})
    assert rows[:3] == NAMES
    assert len(rows) == 63
    assert any(row["tokens"] not in [old["tokens"] for old in NAMES] for row in rows[3:])
    type_of = {"ann lee": "PER", "bob": "PER", "rome": "LOC", "acme corp": "ORG"}
    for row in rows:
        assert len(row["tokens"]) == len(row["tags"])
        assert all(row["tokens"])
        for name, first, last in spans_from_tags(row["tags"]):
            assert row["tags"][first] == f"B-{name}"
            assert type_of[" ".join(row["tokens"][first:last]).lower()] == name


def test_texts_keep_their_label_and_the_rest_of_the_row() -> None:
    rows = augmentation.sentiment(TEXTS, 1, no_synonyms, word_edits=3.0, recombination=3.0)
    assert len(rows) == 21
    words = {
        label: {w for row in TEXTS if row["label"] == label for w in row["text"].split()}
        for label in ("positive", "negative")
    }
    for row in rows:
        assert row.keys() == TEXTS[0].keys()
        assert row["text"]
        assert set(row["text"].split()) <= words[row["label"]]


def test_nothing_is_added_unless_asked_for_and_a_seed_repeats_it() -> None:
    assert augmentation.ner(NAMES, 1, no_synonyms) == NAMES
    one, same, other = (augmentation.sentiment(TEXTS, seed, no_synonyms, word_edits=5.0) for seed in (1, 1, 2))
    assert one == same != other


def test_a_name_that_never_occurs_is_no_error() -> None:
    rows = augmentation.ner(NAMES[2:], 1, no_synonyms, mention_replacement=1.0, word_edits=2.0)
    assert len(rows) == 3
    assert augmentation.sentiment([], 1, no_synonyms, word_edits=1.0) == []


def test_neighbours_are_what_the_core_reads_alike(tmp_path: Path) -> None:
    tokenizer = MemGPTTokenizer.train(["rise fall gain drop " * 50, " rise fall gain drop"], 300)
    vocabulary = tokenizer.get_vocab()
    table = torch.eye(len(tokenizer))
    table[vocabulary["Ġgain"]] += table[vocabulary["Ġrise"]]
    table[vocabulary["Ġdrop"]] += table[vocabulary["Ġfall"]]
    save_file({"model.embed_tokens.weight": table}, tmp_path / "model.safetensors")
    found = augmentation.neighbours(tmp_path, tokenizer, count=1)
    assert found["rise"] == ["gain"]
    assert found["drop"] == ["fall"]


def test_a_tokenizer_without_whole_words_has_no_neighbours(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"augment\.synonyms: the tokenizer of .* has no whole words; set it to 0"):
        augmentation.neighbours(tmp_path, MemGPTTokenizer.train(["1 2 3"], 259), count=1)
