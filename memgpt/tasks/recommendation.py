"""Recommendation: behaviour and items' texts → features, NDCG over the whole catalogue, and popularity to beat."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memgpt.tasks import rows_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from memgpt.model import MemGPTForRecommendation

PRIMARY = "ndcg_at_10"
PICTURE = ("k", "recall")  # columns of what `picture` gives
DEPTH = 50  # how deep a ranking is asked for
_COLD = 5  # an item chosen at most so often in train


def model(
    parent: Path,
    tables: Path,
    *,
    dropout: float,
    max_length: int,
    max_history: int,
    similarity_temperature: float,
    **_: Any,
) -> "MemGPTForRecommendation":
    from memgpt.model import MemGPTForRecommendation
    from memgpt.tasks import heads

    return heads.start(
        MemGPTForRecommendation,
        "recommendation",
        parent,
        dropout=dropout,
        window=max_length,
        max_history=max_history,
        similarity_temperature=similarity_temperature,
    )


def counts(tables: Path) -> Counter[str]:
    """How often each item was chosen in train."""
    return Counter(row["item_id"] for row in rows_of(tables, "recommendation", "train"))


def histories(tables: Path, *splits: str) -> dict[str, list[str]]:
    """Reader → items in order of time, ties by item id."""
    rows = [row for split in splits for row in rows_of(tables, "recommendation", split)]
    rows.sort(key=lambda row: (row["timestamp"], row["item_id"]))
    read: dict[str, list[str]] = {}
    for row in rows:
        read.setdefault(row["user_id"], []).append(row["item_id"])
    return read


class Training:
    """Runs of up to `max_history` + 1 items of a reader: after each item the next one is to be found.

    A batch holds the texts of its items once, and the runs as indices into them.
    """

    def __init__(
        self,
        tables: Path,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        max_length: int,
        max_history: int,
        split: str = "train",
        **_: Any,
    ):
        import torch

        from memgpt.predict.recommendation import encode_items, item_text

        items = rows_of(tables, "recommendation", "items")
        place = {item["item_id"]: index for index, item in enumerate(items)}
        self.pad = tokenizer.pad_token_id
        self.texts = encode_items(
            tokenizer, [item_text(i["title"], i["description"], i["tags"]) for i in items], max_length
        )
        chosen = counts(tables)
        total = sum(chosen.values())
        self.log_frequency = torch.tensor([np.log(max(1, chosen[item["item_id"]]) / total) for item in items])
        self.runs: list[list[int]] = []
        if split == "train":
            for read in histories(tables, "train").values():
                line = [place[item] for item in read]
                for last in range(len(line), 1, -max_history):
                    self.runs.append(line[max(0, last - max_history - 1) : last])
        else:
            for row in test_rows(tables, split):
                run = [place[item] for item in (*row["input"]["history"], row["item_id"])]
                self.runs.append(run[-max_history - 1 :])
        self.length = max_history

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def lengths(self) -> list[int]:
        return [len(run) for run in self.runs]

    def __getitem__(self, index: int) -> list[int]:
        return self.runs[index]

    def collate(self, runs: list[list[int]]) -> "dict[str, torch.Tensor]":
        import torch

        from memgpt.predict.batching import pad

        items = sorted({item for run in runs for item in run})
        place = {item: index for index, item in enumerate(items)}
        history = torch.zeros((len(runs), self.length), dtype=torch.long)
        target = torch.full((len(runs), self.length), -100)
        for index, run in enumerate(runs):
            local = torch.tensor([place[item] for item in run])
            history[index, : len(run) - 1] = local[:-1]
            target[index, : len(run) - 1] = local[1:]
        return {
            **pad([self.texts[item] for item in items], self.pad),
            "history": history,
            "labels": target,
            "log_frequency": self.log_frequency[items].float(),
        }


def write_index(
    model: "MemGPTForRecommendation", tokenizer: "PreTrainedTokenizerFast", tables: Path, directory: Path
) -> None:
    """Encode the catalogue into a model directory."""
    from memgpt.predict.recommendation import build_index

    build_index(model, tokenizer, rows_of(tables, "recommendation", "items"), counts(tables), directory)


def test_rows(tables: Path, split: str = "test") -> list[dict[str, Any]]:
    """One per reader: all that was read before, and the item that came next."""
    before = histories(tables, "train") if split == "validation" else histories(tables, "train", "validation")
    rows = sorted(rows_of(tables, "recommendation", split), key=lambda row: row["user_id"])
    return [
        {"input": {"history": before.get(row["user_id"], []), "k": DEPTH}, "item_id": row["item_id"]} for row in rows
    ]


def statistics(rows: list[dict[str, Any]], predictions: list[list[dict[str, Any]]]) -> np.ndarray:
    """Per reader: NDCG@10, which with one right answer is 1 / log2(rank + 1), and 1."""
    ranks = _ranks(rows, predictions)
    gain = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0.0)
    return np.stack([gain, np.ones(len(rows))], axis=1)


def score(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def metrics(rows: list[dict[str, Any]], predictions: list[list[dict[str, Any]]]) -> dict[str, float]:
    ranks = _ranks(rows, predictions)
    offered = {item["item_id"] for prediction in predictions for item in prediction[:10]}
    return {
        PRIMARY: float(score(statistics(rows, predictions).sum(0))),
        "recall_at_1": float((ranks <= 1).mean()),
        "recall_at_10": float((ranks <= 10).mean()),
        "recall_at_50": float((ranks <= 50).mean()),
        "mrr_at_50": float((1 / ranks).mean()),
        "items_offered_at_10": len(offered),
    }


def baseline(tables: Path, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What most readers chose and this one has not read yet."""
    chosen = counts(tables)
    titles = {item["item_id"]: item["title"] for item in rows_of(tables, "recommendation", "items")}
    order = sorted(titles, key=lambda item: (-chosen[item], item))
    predictions = []
    for row in rows:
        seen = set(row["input"]["history"])
        best = [item for item in order[: DEPTH + len(seen)] if item not in seen][:DEPTH]
        predictions.append([{"item_id": i, "title": titles[i], "score": float(chosen[i])} for i in best])
    return predictions


def slices(rows: list[dict[str, Any]], tables: Path) -> dict[str, np.ndarray]:
    """cold: readers whose next item was hardly ever chosen in train."""
    chosen = counts(tables)
    return {"cold": np.array([chosen[row["item_id"]] <= _COLD for row in rows], dtype=bool)}


def picture(rows: list[dict[str, Any]], predictions: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Share of readers whose next item is among the first k."""
    ranks = _ranks(rows, predictions)
    return [{"k": k, "recall": round(float((ranks <= k).mean()), 4)} for k in range(1, DEPTH + 1)]


def _ranks(rows: list[dict[str, Any]], predictions: list[list[dict[str, Any]]]) -> np.ndarray:
    """Rank of the right item, from 1; infinite where it was not offered."""
    ranks = np.full(len(rows), np.inf)
    for index, (row, prediction) in enumerate(zip(rows, predictions, strict=True)):
        for rank, item in enumerate(prediction, start=1):
            if item["item_id"] == row["item_id"]:
                ranks[index] = rank
                break
    return ranks
