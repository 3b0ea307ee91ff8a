"""Word votes: a linear model, fitted separately and weighted against the trained deep model."""

import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse import csr_matrix, vstack
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from memgpt.model import MemGPTForSequenceClassification, MemGPTForTokenClassification
from memgpt.model.word_votes import TextVotes
from memgpt.predict.batching import batch_size, by_length

_NEVER = -10.0  # the vote for a label without examples in train
Classifier = MemGPTForTokenClassification | MemGPTForSequenceClassification


class Examples(Protocol):
    """The interface of a task's `Training`."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int) -> Any: ...
    @property
    def ids(self) -> Sequence[Sequence[int]]: ...
    def collate(self, rows: list[Any]) -> dict[str, torch.Tensor]: ...


def fit(model: Classifier, data: Examples, strength: float, balanced: bool = False) -> None:
    """Logistic regression on the features of each token, or text, that has a label; nothing if all have the same.

    strength: inverse regularisation. balanced: rare labels count as much as frequent ones.
    """
    votes, canonical_ids = model.word_votes, model.model.ngram_hash.canonical_ids
    assert votes is not None
    rows: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for batch in by_length(data.ids):
        inputs = data.collate([data[place] for place in batch])
        found, kept = votes.addresses(inputs["input_ids"], canonical_ids), inputs["labels"] != -100
        rows.append(found.flatten(kept.dim())[kept])  # [N, F], for a text all of its features
        labels.append(inputs["labels"][kept])
    if not labels or len(torch.cat(labels).unique()) < 2:
        return
    if isinstance(votes, TextVotes):
        votes.count(rows)
    features = vstack([_sparse(part, votes.values(part), 1 + votes.rows) for part in rows], "csr")
    known = np.unique(features.indices)
    linear = LogisticRegression(C=strength, class_weight="balanced" if balanced else None, max_iter=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits do not matter
        linear.fit(features[:, known], torch.cat(labels).numpy())
    weights, bias = torch.tensor(linear.coef_).float(), torch.tensor(linear.intercept_).float()
    if len(weights) == 1:  # for two labels sklearn gives the log-odds of the second
        weights, bias = torch.cat((-weights, weights)) / 2, torch.cat((-bias, bias)) / 2
    with torch.no_grad():
        votes.bias.fill_(_NEVER)[linear.classes_] = bias
        votes.table.weight[known[:, None], linear.classes_] = weights.T


def _sparse(rows: torch.Tensor, values: torch.Tensor, width: int) -> csr_matrix:
    """rows [N, F], the columns of the values [N, F] → sparse [N, width], without the values of column 0."""
    example, feature = rows.nonzero(as_tuple=True)
    places = (example.numpy(), rows[example, feature].numpy())
    return csr_matrix((values[example, feature].numpy(), places), (len(rows), width))


def weigh(model: Classifier, data: Examples) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Set the model's `word_vote_weight` and `label_temperature` (Guo et al. 2017, arXiv 1706.04599) to maximise the
    likelihood of the labels of `data`. Returns both, the deep model's logits [N, L], and the labels [N]."""
    model.config.word_vote_weight = 0.0
    canonical_ids = model.model.ngram_hash.canonical_ids
    parts: list[tuple[torch.Tensor, ...]] = []
    with torch.no_grad():
        for batch in by_length(data.ids, batch_size(model)):
            inputs = data.collate([data[place] for place in batch])
            logits, kept = model(**inputs).logits, inputs["labels"] != -100
            votes = 0 * logits if model.word_votes is None else model.word_votes(inputs["input_ids"], canonical_ids)
            parts.append((logits[kept].double(), votes[kept].double(), inputs["labels"][kept]))
    logits, votes, labels = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    found, summed = {}, logits
    if model.word_votes is not None:
        weight = found["word_vote_weight"] = model.config.word_vote_weight = fit_weight(logits, votes, labels)
        summed = logits + weight * votes
    found["temperature"] = model.config.label_temperature = fit_temperature(summed, labels)
    return found, logits, labels


def fit_weight(logits: np.ndarray, votes: np.ndarray, labels: np.ndarray) -> float:
    """The weight of `votes` added to `logits`, both [N, L], with the least negative log-likelihood of labels [N] at the
    best temperature."""

    def loss(scales: np.ndarray) -> float:
        return _loss(scales[0] * logits + scales[1] * votes, labels)

    of_logits, of_votes = minimize(loss, (1.0, 0.1), bounds=((0.2, 5.0), (0.0, 50.0))).x
    return round(float(of_votes / of_logits), 4)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """logits [N, L], labels [N] → the temperature with the least negative log-likelihood.

    Between 0.2 and 5: if every example is right, lower is always better.
    """

    steps = np.geomspace(0.2, 5.0, 323)  # of one percent
    return round(float(min(steps, key=lambda temperature: _loss(logits / temperature, labels))), 4)


def _loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood of labels [N] under logits [N, L]."""
    return float((np.logaddexp.reduce(logits, axis=1) - logits[range(len(labels)), labels]).mean())
