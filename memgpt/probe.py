"""The core before fine-tuning: its weights are untouched, and the simplest possible model reads its features: logistic
regression, or, for recommendation, which needs no labels, cosine similarity.

What a task's model scores above this is the gain by fine-tuning the core (linear probes: Alain and Bengio 2016,
arXiv 1610.01644). One function per task gives answers in the predictor's format.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoTokenizer

from memgpt.model import MemGPTModel
from memgpt.predict.batching import by_length, encode, pad
from memgpt.predict.words import encode_rows, joined_words, spans_from_tags
from memgpt.tasks import rows_of

_EXAMPLES = 20_000  # of train, words or texts: a linear model needs no more
_WINDOW = 512  # subword tokens of a text


def before(task: str, core: Path, tables: Path, rows: list[dict[str, Any]]) -> list[Any]:
    """The predictions of the core in `core` for a task's test rows, with a head fitted on train."""
    if task == "ner":
        return _ner(_Core(core), tables, rows)
    return (_sentiment if task == "sentiment" else _recommendation)(_Core(core), tables, rows)


class _Core:
    def __init__(self, directory: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = MemGPTModel.from_pretrained(directory).eval()

    @torch.no_grad()
    def hidden(self, rows: list[list[int]]) -> Iterator[tuple[int, np.ndarray]]:
        """Token ids of texts → (index of the text, its features [T, D]), read bidirectionally."""
        rows = [row[:_WINDOW] for row in rows]
        for batch in by_length(rows):
            arguments = pad([rows[i] for i in batch], self.tokenizer.pad_token_id)
            states = self.model(**arguments, attention_mode="bidirectional").last_hidden_state
            for i, state in zip(batch, states.numpy(), strict=True):
                yield i, state[: max(1, len(rows[i]))]

    def pooled(self, texts: list[str]) -> np.ndarray:
        """Mean and maximum of each text's features, [N, 2 D]."""
        read = self.hidden(encode(self.tokenizer, texts))
        found = {i: np.concatenate((state.mean(0), state.max(0))) for i, state in read}
        return np.stack([found[i] for i in range(len(texts))])

    def words(self, rows: list[list[str]]) -> list[np.ndarray]:
        """Features of each word's first subword, [words, D]; only of words in the window."""
        encoded = encode_rows(self.tokenizer, rows)
        found: dict[int, np.ndarray] = {}
        for i, state in self.hidden([[*chain.from_iterable(words)] for words in encoded]):
            firsts = np.cumsum([0, *(len(word) for word in encoded[i][:-1])])
            found[i] = state[firsts[firsts < len(state)]]
        return [found[i] for i in range(len(rows))]


def _fitted(features: np.ndarray, labels: list[str]) -> Pipeline | DummyClassifier:
    if len(set(labels)) < 2:
        return DummyClassifier().fit(features, labels)
    return make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)).fit(features, labels)


def _sentiment(core: _Core, tables: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    train = rows_of(tables, "sentiment", "train")
    if len(train) > _EXAMPLES:  # a random sample, since files may be sorted by label
        drawn = np.random.default_rng(0).choice(len(train), _EXAMPLES, replace=False)
        train = [train[i] for i in np.sort(drawn)]
    classifier = _fitted(core.pooled([row["text"] for row in train]), [row["label"] for row in train])
    labels = classifier.predict(core.pooled([row["input"]["text"] for row in rows]))
    return [{"label": str(label)} for label in labels]


def _ner(core: _Core, tables: Path, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    train, words = [], 0
    for row in rows_of(tables, "ner", "train"):
        if row["tokens"] and words < _EXAMPLES:
            train.append(row)
            words += len(row["tokens"])
    features = core.words([row["tokens"] for row in train])
    tags = [tag for row, states in zip(train, features, strict=True) for tag in row["tags"][: len(states)]]
    classifier = _fitted(np.concatenate(features), tags)
    answers = []
    for row, states in zip(rows, core.words([row["input"] for row in rows]), strict=True):
        places = joined_words(row["input"])
        answers.append(
            [
                {"type": kind, "start": places[first][0], "end": places[last - 1][1]}
                for kind, first, last in spans_from_tags(list(map(str, classifier.predict(states))))
            ]
        )
    return answers


def _recommendation(core: _Core, tables: Path, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The unread items nearest to the mean of those read, after subtracting the catalogue's mean."""
    from memgpt.predict.recommendation import item_text

    items = rows_of(tables, "recommendation", "items")
    vectors = core.pooled([item_text(item["title"], item["description"], item["tags"]) for item in items])
    vectors -= vectors.mean(0)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
    place = {item["item_id"]: i for i, item in enumerate(items)}
    answers = []
    for row in rows:
        read = [place[item] for item in row["input"]["history"]]
        scores = vectors @ vectors[read].mean(0) if read else np.zeros(len(items))
        scores[read] = -np.inf
        best = np.argsort(-scores, kind="stable")[: row["input"]["k"]]
        answers.append([{"item_id": items[i]["item_id"]} for i in best if np.isfinite(scores[i])])
    return answers
