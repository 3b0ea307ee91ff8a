"""The worst mistakes of an evaluation, for people to read: input, gold answer and prediction.

The worst are: for sentiment the wrong labels of highest probability; for ner the most entities missed, invented or
mistyped; for recommendation the right item ranked last; for base the most bits per byte.
"""

from pathlib import Path
from typing import Any

import numpy as np

from memgpt.predict.words import joined_words, spans_from_tags
from memgpt.tasks import rows_of

Record = dict[str, Any]
_CHARACTERS = 1000  # of a text that are kept


def worst(
    model: str, rows: list[Record], predictions: list[Any], statistics: np.ndarray, tables: Path, limit: int
) -> list[Record]:
    """At most `limit` of `judged`, the worst first; fewer if fewer are wrong."""
    wrong = [record for record in judged(model, rows, predictions, statistics, tables) if record["badness"] > 0]
    return sorted(wrong, key=lambda record: -record["badness"])[:limit]


def judged(
    model: str, rows: list[Record], predictions: list[Any], statistics: np.ndarray, tables: Path
) -> list[Record]:
    """A record {input, gold, prediction, badness} for every row; badness 0 means right.

    statistics: those of the rows, from the task's module.
    """
    titles = {}
    if model == "recommendation":
        titles = {item["item_id"]: item["title"] for item in rows_of(tables, model, "items")}
    records = []
    for row, prediction, numbers in zip(rows, predictions, statistics, strict=True):
        if model == "sentiment":
            record = _sentiment(row, prediction)
        elif model == "ner":
            record = _ner(row, prediction, numbers)
        elif model == "recommendation":
            record = _recommendation(row, prediction, titles)
        else:
            badness = prediction["bits_per_byte"]
            record = {"input": row["input"], "gold": None, "prediction": prediction, "badness": badness}
        records.append({**record, "input": _cut(record["input"])})
    return records


def _sentiment(row: Record, prediction: Record) -> Record:
    sure = prediction["scores"][prediction["label"]] if prediction["label"] != row["label"] else 0.0
    return {"input": row["input"]["text"], "gold": row["label"], "prediction": prediction, "badness": sure}


def _ner(row: Record, prediction: list[Record], numbers: np.ndarray) -> Record:
    places, text = joined_words(row["input"]), " ".join(row["input"])
    gold = [
        {"text": text[places[first][0] : places[last - 1][1]], "type": kind, "start": places[first][0]}
        for kind, first, last in spans_from_tags(row["tags"])
    ]
    found, predicted, there = numbers
    return {"input": text, "gold": gold, "prediction": prediction, "badness": float(predicted + there - 2 * found)}


def _recommendation(row: Record, prediction: list[Record], titles: dict[str, str]) -> Record:
    """badness: the share of the ranking before the right item; 1 if it was not offered."""
    ranked = [item["item_id"] for item in prediction]
    place = ranked.index(row["item_id"]) if row["item_id"] in ranked else len(ranked)
    return {
        "input": [titles[item] for item in row["input"]["history"][-5:]],
        "gold": titles[row["item_id"]],
        "prediction": [item["title"] for item in prediction[:5]],
        "badness": place / len(ranked) if ranked else 1.0,
    }


def _cut(value: Any) -> Any:
    return value[:_CHARACTERS] if isinstance(value, str) else value
