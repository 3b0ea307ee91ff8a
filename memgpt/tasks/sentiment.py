"""Sentiment: labelled texts → features, macro F1, and a bag of words as baseline."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memgpt.tasks import by_length, manifest, metric_names, rows_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from memgpt.model import MemGPTForSequenceClassification

PRIMARY = "macro_f1"
PICTURE = ("actual", "predicted")  # columns of `picture`
_TOPIC_TEXTS = 10  # a topic with fewer texts in train is not predicted, with fewer in test it is no slice
_STRENGTH = 3.0  # inverse regularisation of the linear model behind word votes


def labels(tables: Path) -> list[str]:
    return list(manifest(tables, "sentiment")["labels"])


def topics(tables: Path) -> list[str] | None:
    """The topics with enough texts in train to be learned; None if there are fewer than two."""
    counts = Counter(row["topic"] for row in rows_of(tables, "sentiment", "train") if row["topic"])
    names = sorted(name for name, count in counts.items() if count >= _TOPIC_TEXTS)
    return names if len(names) > 1 else None


def model(
    parent: Path, tables: Path, *, dropout: float, max_length: int, word_votes: int = 0, **_: Any
) -> "MemGPTForSequenceClassification":
    from transformers import AutoTokenizer

    from memgpt.model import MemGPTForSequenceClassification
    from memgpt.tasks import heads, votes

    names = labels(tables)
    started = heads.start(
        MemGPTForSequenceClassification,
        "sentiment",
        parent,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        topics=topics(tables),
        dropout=dropout,
        window=max_length,
        word_vote_rows=word_votes,
        word_vote_weight=0.0,
    )
    if started.word_votes is not None:
        data = Training(tables, AutoTokenizer.from_pretrained(parent), max_length=max_length)
        votes.fit(started, data, _STRENGTH, balanced=True)
    return started


class Training:
    """Texts as subword ids, truncated to `max_length`, with the index of their label and of their topic (−100: none).

    class_balance b: a text's weight is proportional to (texts of its label)^−b, 1 on average.
    """

    def __init__(
        self,
        tables: Path,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        max_length: int,
        split: str = "train",
        augment: dict[str, float] | None = None,
        seed: int = 0,
        class_balance: float = 0.0,
        **_: Any,
    ):
        from memgpt import augmentation
        from memgpt.predict.batching import encode

        index = {label: place for place, label in enumerate(labels(tables))}
        topic_index = {topic: place for place, topic in enumerate(topics(tables) or ())}
        thesaurus = partial(augmentation.neighbours, Path(tokenizer.name_or_path), tokenizer)
        rows = augmentation.sentiment(rows_of(tables, "sentiment", split), seed, thesaurus, **augment or {})
        self.pad = tokenizer.pad_token_id
        texts = [row["text"] for row in rows]
        self.ids = encode(tokenizer, texts, max_length)
        self.labels = [index[row["label"]] for row in rows]
        self.topics = [topic_index.get(row["topic"], -100) for row in rows] if topic_index else None
        counts = np.bincount(np.array(self.labels, dtype=int), minlength=len(index))
        weights = np.maximum(counts, 1.0) ** -class_balance
        self.weights = (weights / weights[self.labels].mean()).tolist() if class_balance and rows else None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def __getitem__(self, place: int) -> int:
        return place

    def collate(self, rows: list[int]) -> "dict[str, torch.Tensor]":
        import torch

        from memgpt.predict.batching import pad

        batch = {**pad([self.ids[i] for i in rows], self.pad), "labels": torch.tensor([self.labels[i] for i in rows])}
        if self.topics:
            batch["topics"] = torch.tensor([self.topics[i] for i in rows])
        if self.weights:
            batch["sample_weights"] = torch.tensor([self.weights[self.labels[i]] for i in rows])
        return batch


def calibrate(
    model: "MemGPTForSequenceClassification", tokenizer: "PreTrainedTokenizerFast", tables: Path, max_length: int
) -> dict[str, float]:
    """Fit the votes' weight and the temperature on validation, set and return them, with the calibration error before
    that."""
    from memgpt.tasks import votes

    data = Training(tables, tokenizer, max_length=max_length, split="validation")
    found, logits, labels = votes.weigh(model, data)
    confidence = np.exp(logits.max(1) - np.logaddexp.reduce(logits, axis=1))
    found["expected_calibration_error_before"] = calibration_error(_bins(confidence, logits.argmax(1) == labels))
    return found


def test_rows(tables: Path, split: str = "test") -> list[dict[str, Any]]:
    return [
        {"input": {"text": row["text"], "topic": row["topic"]}, "label": row["label"]}
        for row in rows_of(tables, "sentiment", split)
    ]


def statistics(rows: list[dict[str, Any]], predictions: list[dict[str, Any]]) -> np.ndarray:
    """Per text: its cell of the confusion matrix, [actual L, predicted L + 1] flattened; the last column is for
    predicted labels that do not occur in the rows."""
    names = sorted({row["label"] for row in rows})
    index = {name: place for place, name in enumerate(names)}
    cells = np.zeros((len(rows), len(names), len(names) + 1))
    for place, (row, prediction) in enumerate(zip(rows, predictions, strict=True)):
        cells[place, index[row["label"]], index.get(prediction["label"], len(names))] = 1
    return cells.reshape(len(rows), -1)


def score(sums: np.ndarray) -> np.ndarray:
    """Macro F1 over the labels that occur."""
    size = int(np.sqrt(sums.shape[-1]))  # L · (L + 1) lies between L² and (L + 1)²
    matrix = sums.reshape(*sums.shape[:-1], size, size + 1)
    right = np.diagonal(matrix, axis1=-2, axis2=-1)
    total = matrix.sum(-1) + matrix[..., :size].sum(-2)
    # A slice or a resample may lack a label of the whole set.
    return (2 * right / np.maximum(total, 1)).sum(-1) / np.maximum((total > 0).sum(-1), 1)


def metrics(rows: list[dict[str, Any]], predictions: list[dict[str, Any]]) -> dict[str, float]:
    sums = statistics(rows, predictions).sum(0)
    size = int(np.sqrt(len(sums)))
    matrix = sums.reshape(size, size + 1)
    calibration = reliability(rows, predictions)
    accuracy = sum(p["label"] == row["label"] for row, p in zip(rows, predictions, strict=True)) / len(rows)
    result = {
        PRIMARY: float(score(sums)),
        "accuracy": accuracy,
        "expected_calibration_error": calibration_error(calibration),
    }
    known = [
        row["input"]["topic"] == p["predicted_topic"]
        for row, p in zip(rows, predictions, strict=True)
        if row["input"]["topic"] and p.get("predicted_topic")
    ]
    if known:
        result["topic_accuracy"] = float(np.mean(known))
    for place, name in enumerate(metric_names(sorted({row["label"] for row in rows}))):
        total = matrix[place].sum() + matrix[:, place].sum()
        result[f"f1_{name}"] = float(2 * matrix[place, place] / max(total, 1))
    return result


def baseline(tables: Path, rows: list[dict[str, Any]], strength: float = 10.0) -> list[dict[str, Any]]:
    """Logistic regression on a bag of words and word pairs, with inverse regularisation `strength`. If train has only
    one label, always that one."""
    from sklearn.dummy import DummyClassifier
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train = rows_of(tables, "sentiment", "train")
    labels = [row["label"] for row in train]
    several = len(set(labels)) > 1
    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]"),
        LogisticRegression(C=strength, max_iter=1000) if several else DummyClassifier(),
    )
    classifier.fit([row["text"] for row in train], labels)
    names = [str(name) for name in classifier.classes_]
    return [
        {
            "label": names[int(np.argmax(scores))],
            "scores": dict(zip(names, map(float, scores), strict=True)),
            "topic": row["input"]["topic"],
        }
        for row, scores in zip(rows, classifier.predict_proba([row["input"]["text"] for row in rows]), strict=True)
    ]


def slices(rows: list[dict[str, Any]], tables: Path) -> dict[str, np.ndarray]:
    """One per topic with enough texts; short, long: by number of characters."""
    topics = [row["input"]["topic"] for row in rows]
    names = sorted(name for name, count in Counter(filter(None, topics)).items() if count >= _TOPIC_TEXTS)
    return {
        **{f"topic_{name}": np.array([topic == name for topic in topics]) for name in names},
        **by_length([len(row["input"]["text"]) for row in rows]),
    }


def picture(rows: list[dict[str, Any]], predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"actual": row["label"], "predicted": p["label"]} for row, p in zip(rows, predictions, strict=True)]


def reliability(rows: list[dict[str, Any]], predictions: list[dict[str, Any]]) -> np.ndarray:
    """Ten equally wide bins of the predicted label's probability → [non-empty bins, (confidence, accuracy, share)]."""
    confidence = np.array([max(p["scores"].values()) for p in predictions])
    return _bins(confidence, np.array([p["label"] == row["label"] for row, p in zip(rows, predictions, strict=True)]))


def calibration_error(bins: np.ndarray) -> float:
    """Mean absolute difference of a bin's confidence and accuracy, weighted by its share of texts."""
    return float((bins[:, 2] * np.abs(bins[:, 0] - bins[:, 1])).sum())


def _bins(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> np.ndarray:
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.array(
        [
            (confidence[place == index].mean(), right[place == index].mean(), (place == index).mean())
            for index in np.unique(place)
        ]
    )
