"""Sentiment: labelled texts → features, macro F1, and a bag of words to beat."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memgpt.tasks import by_length, manifest, rows_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from memgpt.model import MemGPTForSequenceClassification

PRIMARY = "macro_f1"
PICTURE = ("actual", "predicted")  # columns of what `picture` gives


def labels(tables: Path) -> list[str]:
    return list(manifest(tables, "sentiment")["labels"])


def model(
    parent: Path, tables: Path, *, dropout: float, max_length: int, **_: Any
) -> "MemGPTForSequenceClassification":
    from memgpt.model import MemGPTForSequenceClassification
    from memgpt.tasks import heads

    names = labels(tables)
    return heads.start(
        MemGPTForSequenceClassification,
        "sentiment",
        parent,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        dropout=dropout,
        window=max_length,
    )


class Training:
    """Texts as subword ids, cut at `max_length`, with the index of their label."""

    def __init__(
        self,
        tables: Path,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        max_length: int,
        split: str = "train",
        augment: dict[str, float] | None = None,
        seed: int = 0,
        **_: Any,
    ):
        from memgpt import augmentation

        index = {label: place for place, label in enumerate(labels(tables))}
        synonyms = partial(augmentation.neighbours, Path(tokenizer.name_or_path), tokenizer)
        rows = augmentation.sentiment(rows_of(tables, "sentiment", split), augment or {}, seed, synonyms)
        self.pad = tokenizer.pad_token_id
        texts = [row["text"] for row in rows]
        self.ids = [
            ids[:max_length]
            for ids in tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        ]
        self.labels = [index[row["label"]] for row in rows]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def __getitem__(self, place: int) -> tuple[list[int], int]:
        return self.ids[place], self.labels[place]

    def collate(self, rows: list[tuple[list[int], int]]) -> "dict[str, torch.Tensor]":
        import torch

        from memgpt.predict.batching import pad

        return {**pad([ids for ids, _ in rows], self.pad), "labels": torch.tensor([label for _, label in rows])}


def test_rows(tables: Path, split: str = "test") -> list[dict[str, Any]]:
    return [
        {"input": {"text": row["text"], "topic": row["topic"]}, "label": row["label"]}
        for row in rows_of(tables, "sentiment", split)
    ]


def statistics(rows: list[dict[str, Any]], predictions: list[dict[str, Any]]) -> np.ndarray:
    """Per text: its cell of the confusion matrix, [actual L, predicted L + 1] flattened; the last column is for labels
    that never occur in the rows."""
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
    return (2 * right / np.maximum(total, 1)).mean(-1)


def metrics(rows: list[dict[str, Any]], predictions: list[dict[str, Any]]) -> dict[str, float]:
    sums = statistics(rows, predictions).sum(0)
    size = int(np.sqrt(len(sums)))
    matrix = sums.reshape(size, size + 1)
    calibration = reliability(rows, predictions)
    accuracy = sum(p["label"] == row["label"] for row, p in zip(rows, predictions, strict=True)) / len(rows)
    result = {
        PRIMARY: float(score(sums)),
        "accuracy": accuracy,
        "expected_calibration_error": float((calibration[:, 2] * np.abs(calibration[:, 0] - calibration[:, 1])).sum()),
    }
    for place, name in enumerate(sorted({row["label"] for row in rows})):
        total = matrix[place].sum() + matrix[:, place].sum()
        result[f"f1_{name.lower().replace(' ', '_').replace('-', '_')}"] = float(
            2 * matrix[place, place] / max(total, 1)
        )
    return result


def baseline(tables: Path, rows: list[dict[str, Any]], strength: float = 10.0) -> list[dict[str, Any]]:
    """A bag of words and word pairs with logistic regression, of inverse regularisation `strength`."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train = rows_of(tables, "sentiment", "train")
    classifier = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]"),
        LogisticRegression(C=strength, max_iter=1000),
    )
    classifier.fit([row["text"] for row in train], [row["label"] for row in train])
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
    """One per topic, where texts have one; short, long: by the number of letters."""
    topics = [row["input"]["topic"] for row in rows]
    return {
        **{f"topic_{name}": np.array([topic == name for topic in topics]) for name in sorted({t for t in topics if t})},
        **by_length([len(row["input"]["text"]) for row in rows]),
    }


def picture(rows: list[dict[str, Any]], predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"actual": row["label"], "predicted": p["label"]} for row, p in zip(rows, predictions, strict=True)]


def reliability(rows: list[dict[str, Any]], predictions: list[dict[str, Any]], bins: int = 10) -> np.ndarray:
    """Ten equally wide bins of the winning label's probability → [bins that occur, (confidence, accuracy, share)]."""
    confidence = np.array([max(p["scores"].values()) for p in predictions])
    right = np.array([p["label"] == row["label"] for row, p in zip(rows, predictions, strict=True)], dtype=float)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.array(
        [
            (confidence[place == index].mean(), right[place == index].mean(), (place == index).mean())
            for index in np.unique(place)
        ]
    )
