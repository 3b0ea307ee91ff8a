"""Unlabelled rows: which are most worth labelling by hand, and which the model can label itself.

Active learning: the most uncertain rows are clustered by the model's own features, weighted by their uncertainty. Each
cluster is represented by its most uncertain row: *Diverse mini-batch active learning* (Zhdanov 2019, arXiv 1901.05954).
Self-training: confident predictions become labels of further training rows.
"""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from memgpt import predict
from memgpt.errors import UserError
from memgpt.predict.batching import batch_size, by_length, encode, pad
from memgpt.predict.words import encode_rows, split_words
from memgpt.sources import formats, naming
from memgpt.tables import USUAL
from memgpt.tasks.ner import predicted_tags

_POOL = 10  # uncertain rows to choose from, per requested row
_LEAST_SURE = 3  # the least certain words of a sentence, which represent it


def suggest(task: str, directory: Path, path: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """At most `count` rows of the file as {text | tokens, uncertainty, prediction, stands_for, reason, from}, the most
    uncertain first.

    uncertainty: 1 − the largest probability; for ner its mean over the least certain words. stands_for: the number of
    uncertain rows that are most like this one, including itself. Equal rows are taken once.

    Raises:
        UserError: if the file cannot be read, or has no column of texts (for ner also: of tokens).
    """
    column, rows, places, read = _read(task, path)
    predictor: Any = predict.load(task, directory)
    uncertainty, features = _ask(predictor, task, rows)
    pool = np.argsort(-uncertainty, kind="stable")[: _POOL * count]
    chosen, sizes = _diverse(uncertainty[pool], features[pool], count, seed)
    best = pool[chosen]
    answers = predictor.predict([rows[i] for i in best])
    return [
        {
            column: rows[i],
            "uncertainty": round(float(uncertainty[i]), 6),
            "prediction": answer,
            "stands_for": int(size),
            "reason": _reason(task, float(uncertainty[i]), int(size)),
            "from": read.at(places[i]),
        }
        for i, answer, size in zip(best, answers, sizes, strict=True)
    ]


def pseudo_label(task: str, directory: Path, path: Path, least: float) -> tuple[list[dict[str, Any]], int]:
    """The rows of which the model is confident, as training rows {text, label, topic?} or {tokens, tags}; and how many
    rows the file has.

    least: the least confidence: 1 − the row's `uncertainty`, as in `suggest`.

    Raises:
        UserError: as in `suggest`.
    """
    _, rows, places, read = _read(task, path)
    predictor: Any = predict.load(task, directory)
    uncertainty, _ = _ask(predictor, task, rows)
    kept = np.flatnonzero(1 - uncertainty >= least)
    sure, count = [rows[i] for i in kept], len(read.frame)
    if task == "ner":
        words = _words(sure)
        tags = predicted_tags(words, predictor.predict(words))
        return [{"tokens": row, "tags": own} for row, own in zip(words, tags, strict=True)], count
    found = [{"text": row, "label": answer["label"]} for row, answer in zip(sure, predictor.predict(sure), strict=True)]
    topic = next((name for name in USUAL["sentiment"]["topic"] if name in read.frame), None)
    if topic is not None:
        for row, i in zip(found, kept, strict=True):
            value = read.frame[topic][places[i]]
            row["topic"] = None if pd.isna(value) else str(value)  # JSON takes no numbers as Parquet gives them
    return found, count


def _read(task: str, path: Path) -> tuple[str, list[Any], list[int], formats.Rows]:
    """(name of the column, its values without repeated and empty ones, the row of each, the file's content)."""
    if not path.is_file():
        raise UserError(f"{path}: not found; name a file of unlabelled rows")
    if not naming.data_format(path.name):
        raise UserError(f"{path}: not a format that is read; formats are .{', .'.join(naming.FORMATS)}, each also .gz")
    read = formats.read(naming.Part(naming.WHOLE, str(path), path))
    usual = {"text": USUAL["sentiment"]["text"], **({"tokens": USUAL["ner"]["tokens"]} if task == "ner" else {})}
    for column, names in reversed(usual.items()):
        name = next((name for name in names if name in read.frame), None)
        if name is None:
            continue
        found: dict[Any, int] = {}
        for place, value in enumerate(read.frame[name]):
            whole = all(isinstance(word, str) for word in value) if isinstance(value, list) else isinstance(value, str)
            if not whole or isinstance(value, list) != (column == "tokens"):
                wanted = "a list of words" if column == "tokens" else "a text"
                raise UserError(f"{read.at(place)}: {name} is not {wanted}")
            if any(word.strip() for word in value):
                found.setdefault(tuple(value) if column == "tokens" else value, place)
        if not found:
            raise UserError(f"{path}: {name} holds no text")
        rows = [list(value) if column == "tokens" else value for value in found]
        return column, rows, list(found.values()), read
    raise UserError(f"{path}: no column of texts; call one {' or '.join(chain(*usual.values()))}")


def _words(rows: list[Any]) -> list[list[str]]:
    return [row if isinstance(row, list) else [row[a:b] for a, b in split_words(row)] for row in rows]


@torch.no_grad()
def _ask(predictor: Any, task: str, rows: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Uncertainty [N] and features [N, D] of each row, truncated to the model's window."""
    model, tokenizer, window = predictor.model, predictor.tokenizer, predictor.model.config.window
    if task == "ner":
        encoded = encode_rows(tokenizer, _words(rows))
        ids = [[*chain.from_iterable(pieces)][:window] for pieces in encoded]
    else:
        ids = encode(tokenizer, rows, window)
    uncertainty, features = np.zeros(len(rows)), np.zeros((len(rows), model.config.hidden_size))
    with tqdm(total=len(rows), desc="suggest-labels", unit="row", disable=None, leave=False) as progress:
        for batch in by_length(ids, batch_size(model)):
            arguments = pad([ids[i] for i in batch], tokenizer.pad_token_id, predictor.model.device)
            outputs = model(**arguments, output_hidden_states=True)
            kept = arguments["attention_mask"][..., None]
            features[batch] = ((outputs.hidden_states[-1] * kept).sum(1) / kept.sum(1)).float().cpu().numpy()
            logits = outputs.logits.float() / model.config.label_temperature
            doubt = 1 - logits.softmax(-1).amax(-1).cpu().numpy()
            for row, i in enumerate(batch):
                if task == "ner":
                    firsts = np.cumsum([0, *(len(piece) for piece in encoded[i][:-1])])
                    uncertainty[i] = np.sort(doubt[row, firsts[firsts < len(ids[i])]])[-_LEAST_SURE:].mean()
                else:
                    uncertainty[i] = doubt[row]
            progress.update(len(batch))
    return uncertainty, features


def _diverse(uncertainty: np.ndarray, features: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The most uncertain member of each of `count` clusters, the most uncertain first, and the clusters' sizes."""
    from sklearn.cluster import KMeans

    count = min(count, len(np.unique(features, axis=0)))
    clusters = KMeans(count, n_init=1, random_state=seed).fit(features, sample_weight=uncertainty + 1e-6).labels_
    members = [np.flatnonzero(clusters == cluster) for cluster in np.unique(clusters)]
    best = sorted((int(own[uncertainty[own].argmax()]), len(own)) for own in members)
    best.sort(key=lambda pair: -uncertainty[pair[0]])
    return np.array([place for place, _ in best]), np.array([size for _, size in best])


def _reason(task: str, uncertainty: float, size: int) -> str:
    unsure = "its least sure words have" if task == "ner" else "the likeliest label has"
    like = f"stands for {size} uncertain rows like it" if size > 1 else "no other uncertain row is like it"
    return f"{unsure} probability {1 - uncertainty:.2f}; {like}"
