"""Sentiment: labelled texts → features, macro F1, and a bag of words to beat."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memgpt.tasks import by_length, manifest, rows_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from memgpt.model import MemGPTForSequenceClassification
    from memgpt.model.label_memory import WordVotes

PRIMARY = "macro_f1"
PICTURE = ("actual", "predicted")  # columns of what `picture` gives
_TOPIC_TEXTS = 10  # a topic that fewer texts of train have is not predicted
_STRENGTH = 3.0  # inverse regularisation of the linear model behind word votes
_NEVER = -10.0  # the vote for a label that no text of train has


def labels(tables: Path) -> list[str]:
    return list(manifest(tables, "sentiment")["labels"])


def topics(tables: Path) -> list[str] | None:
    """The topics that enough texts of train have to be learnt; None if there are not two."""
    counts = Counter(row["topic"] for row in rows_of(tables, "sentiment", "train") if row["topic"])
    names = sorted(name for name, count in counts.items() if count >= _TOPIC_TEXTS)
    return names if len(names) > 1 else None


def model(
    parent: Path, tables: Path, *, dropout: float, max_length: int, word_votes: int = 0, **_: Any
) -> "MemGPTForSequenceClassification":
    from transformers import AutoTokenizer

    from memgpt.model import MemGPTForSequenceClassification
    from memgpt.tasks import heads

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
        _fit_votes(started.word_votes, started.model.ngram_hash.canonical_ids, data)
    return started


def _fit_votes(votes: "WordVotes", canonical_ids: "torch.Tensor", data: "Training") -> None:
    """Logistic regression on the words and word pairs of `data`, rare labels counting as much as frequent ones."""
    import torch
    from scipy.sparse import csr_matrix, vstack
    from sklearn.linear_model import LogisticRegression

    from memgpt.predict.batching import by_length

    if len(set(data.labels)) < 2:
        return
    batches = list(by_length(data.ids))
    rows = [votes.addresses(data.collate(batch)["input_ids"], canonical_ids) for batch in batches]
    texts = torch.zeros(len(votes.idf))  # that have the feature
    for text in (text for found in rows for text in found):
        texts[text.unique()] += 1
    texts[0] = 0
    known = texts.nonzero()[:, 0]
    votes.idf[known] = torch.log((1 + len(data)) / (1 + texts[known])) + 1
    features = [
        csr_matrix(
            (votes.values(found).flatten(), (np.repeat(np.arange(len(found)), found[0].numel()), found.flatten())),
            (len(found), len(votes.idf)),
        )
        for found in rows
    ]
    linear = LogisticRegression(C=_STRENGTH, class_weight="balanced", max_iter=1000)
    linear.fit(vstack(features, "csr")[:, known.numpy()], np.array(data.labels)[np.concatenate(batches)])
    weights, bias = torch.tensor(linear.coef_).float(), torch.tensor(linear.intercept_).float()
    if len(weights) == 1:  # of two labels: the log-odds of the second
        weights, bias = torch.cat((-weights, weights)) / 2, torch.cat((-bias, bias)) / 2
    with torch.no_grad():
        votes.bias.fill_(_NEVER)[linear.classes_] = bias
        votes.table.weight[known[:, None], linear.classes_] = weights.T


class Training:
    """Texts as subword ids, cut at `max_length`, with the index of their label and of their topic (−100: none).

    class_balance b: a text weighs in proportion to (texts of its label)^−b, 1 on average.
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

        index = {label: place for place, label in enumerate(labels(tables))}
        topic_index = {topic: place for place, topic in enumerate(topics(tables) or ())}
        thesaurus = partial(augmentation.neighbours, Path(tokenizer.name_or_path), tokenizer)
        rows = augmentation.sentiment(rows_of(tables, "sentiment", split), seed, thesaurus, **augment or {})
        self.pad = tokenizer.pad_token_id
        texts = [row["text"] for row in rows]
        self.ids = [
            ids[:max_length]
            for ids in tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        ]
        self.labels = [index[row["label"]] for row in rows]
        self.topics = [topic_index.get(row["topic"], -100) for row in rows] if topic_index else None
        weights = np.maximum(np.bincount(self.labels, minlength=len(index)), 1.0) ** -class_balance
        self.weights = (weights / weights[self.labels].mean()).tolist() if class_balance else None

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
            batch["topic_labels"] = torch.tensor([self.topics[i] for i in rows])
        if self.weights:
            batch["label_weights"] = torch.tensor([self.weights[self.labels[i]] for i in rows])
        return batch


def calibrate(
    model: "MemGPTForSequenceClassification", tokenizer: "PreTrainedTokenizerFast", tables: Path, max_length: int
) -> dict[str, float]:
    """Set the model's `word_vote_weight` and `label_temperature` to those that make the validation split likeliest (the
    latter: Guo et al. 2017, arXiv 1706.04599) → they, and the calibration error that the split had without."""
    import torch

    from memgpt.predict.batching import batch_size, by_length

    data = Training(tables, tokenizer, max_length=max_length, split="validation")
    logits, votes = np.zeros((2, len(data), model.config.num_labels))
    model.config.word_vote_weight = 0.0
    with torch.no_grad():
        for batch in by_length(data.ids, batch_size(model)):
            inputs = data.collate(batch)
            logits[batch] = model(**inputs).logits.double().numpy()
            if model.word_votes is not None:
                canonical = model.model.ngram_hash.canonical_ids
                votes[batch] = model.word_votes(inputs["input_ids"], canonical).double().numpy()
    labels, found = np.array(data.labels), {}
    confidence = np.exp(logits.max(1) - np.logaddexp.reduce(logits, axis=1))
    found["expected_calibration_error_before"] = calibration_error(_bins(confidence, logits.argmax(1) == labels))
    if model.word_votes is not None:
        weight = found["word_vote_weight"] = model.config.word_vote_weight = fit_weight(logits, votes, labels)
        logits += weight * votes
    found["temperature"] = model.config.label_temperature = fit_temperature(logits, labels)
    return found


def fit_weight(logits: np.ndarray, votes: np.ndarray, labels: np.ndarray) -> float:
    """What `votes` should count beside `logits`, both [N, L], for labels [N]: with the least negative log-likelihood at
    the best temperature."""
    from scipy.optimize import minimize

    def loss(scales: np.ndarray) -> float:
        return _loss(scales[0] * logits + scales[1] * votes, labels)

    of_logits, of_votes = minimize(loss, (1.0, 0.1), bounds=((0.2, 5.0), (0.0, 50.0))).x
    return round(float(of_votes / of_logits), 4)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """logits [N, L], labels [N] → the temperature with the least negative log-likelihood.

    Between 0.2 and 5: where every text of the split is right, ever colder would be ever better.
    """

    steps = np.geomspace(0.2, 5.0, 323)  # of one percent
    return round(float(min(steps, key=lambda temperature: _loss(logits / temperature, labels))), 4)


def _loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood of labels [N] under logits [N, L]."""
    return float((np.logaddexp.reduce(logits, axis=1) - logits[range(len(labels)), labels]).mean())


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
        "expected_calibration_error": calibration_error(calibration),
    }
    known = [
        row["input"]["topic"] == p["predicted_topic"]
        for row, p in zip(rows, predictions, strict=True)
        if row["input"]["topic"] and p.get("predicted_topic")
    ]
    if known:
        result["topic_accuracy"] = float(np.mean(known))
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


def reliability(rows: list[dict[str, Any]], predictions: list[dict[str, Any]]) -> np.ndarray:
    """Ten equally wide bins of the winning label's probability → [bins that occur, (confidence, accuracy, share)]."""
    confidence = np.array([max(p["scores"].values()) for p in predictions])
    return _bins(confidence, np.array([p["label"] == row["label"] for row, p in zip(rows, predictions, strict=True)]))


def calibration_error(bins: np.ndarray) -> float:
    """How far confidence and accuracy of the bins lie apart, on average over the texts."""
    return float((bins[:, 2] * np.abs(bins[:, 0] - bins[:, 1])).sum())


def _bins(confidence: np.ndarray, right: np.ndarray, bins: int = 10) -> np.ndarray:
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return np.array(
        [
            (confidence[place == index].mean(), right[place == index].mean(), (place == index).mean())
            for index in np.unique(place)
        ]
    )
