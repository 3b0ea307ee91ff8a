"""Recommendation: behaviour and items' texts → features, the weights of the ranking, NDCG over the whole catalogue, and
popularity as baseline."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memgpt.tasks import rows_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from memgpt.model import MemGPTForRecommendation
    from memgpt.predict.recommendation import Index, Predictor

PRIMARY = "ndcg_at_10"
PICTURE = ("k", "recall")  # columns of `picture`
DEPTH = 50  # length of a requested ranking
_COLD = 5  # choices of a cold item, or by a cold reader, at most
_REACH = 30  # largest distance in a reader's history at which two items are co-visited
_NEIGHBOURS = 300  # co-visited items kept per item
_SHRINKAGE = 3  # choices: lowers the co-visitation of items that were rarely chosen
_COMPETING = 20_000  # items that compete when tastes are learned, if there are more
_PIECE = 256  # readers' steps whose scores are held at once there
_CELLS = 20_000_000  # readers × items on which the weights are learned, at most


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
    """Reader → items in order of time; ties are broken by item id."""
    rows = [row for split in splits for row in rows_of(tables, "recommendation", split)]
    rows.sort(key=lambda row: (row["timestamp"], row["item_id"]))
    read: dict[str, list[str]] = {}
    for row in rows:
        read.setdefault(row["user_id"], []).append(row["item_id"])
    return read


class Training:
    """Runs of up to `max_history` + 1 items of a reader; after each item the next one is to be predicted.

    A batch has the texts of its items once, and the runs as indices into them.
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

        from memgpt.predict.batching import encode
        from memgpt.predict.recommendation import item_text

        items = rows_of(tables, "recommendation", "items")
        place = {item["item_id"]: index for index, item in enumerate(items)}
        self.pad = tokenizer.pad_token_id
        self.texts = encode(tokenizer, [item_text(i["title"], i["description"], i["tags"]) for i in items], max_length)
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
    model: "MemGPTForRecommendation",
    tokenizer: "PreTrainedTokenizerFast",
    tables: Path,
    directory: Path,
    *,
    rerank: bool,
    taste_epochs: int,
    seed: int,
    **_: Any,
) -> None:
    """Encode the catalogue into a model directory; with `rerank`, also learn tastes and the weights of the ranking."""
    import torch

    from memgpt.predict.recommendation import Index, Predictor, build_index

    items = rows_of(tables, "recommendation", "items")
    build_index(model, tokenizer, items, counts(tables), directory, behaviour(tables))
    if rerank:
        index = Index.read(directory)
        with torch.random.fork_rng(devices=[]):  # early stopping calls this between epochs: keep their draws
            learn_tastes(model, index, list(histories(tables, "train").values()), directory, taste_epochs, seed)
        index.write(directory)
        index.weights = fit_weights(Predictor(directory), test_rows(tables, "validation"))
        index.write(directory)


def behaviour(tables: Path) -> "dict[str, torch.Tensor]":
    """What readers did in train, in the form of `memgpt.predict.recommendation.Index`.

    Co-visitation of items a and b is a sum over readers: 1 / d if they chose b d items after a, half of that if they
    chose a after b. It is divided by √(choices of a · choices of b), as in the cosine of item-based filtering, plus a
    shrinkage (Sarwar et al. 2001; Koren 2008).
    """
    import torch

    items = [item["item_id"] for item in rows_of(tables, "recommendation", "items")]
    place = {item: index for index, item in enumerate(items)}
    last: dict[str, int] = {}
    for row in rows_of(tables, "recommendation", "train"):
        last[row["item_id"]] = max(row["timestamp"], last.get(row["item_id"], row["timestamp"]))
    newest = max(last.values(), default=0)
    idle = np.array([(newest - last[item]) / 86400 if item in last else np.nan for item in items])
    lines = [[place[item] for item in read] for read in histories(tables, "train").values()]
    line = np.array([item for read in lines for item in read])
    reader = np.repeat(np.arange(len(lines)), [len(read) for read in lines])
    pairs, weights = [], []
    for distance in range(1, _REACH + 1):
        same = reader[:-distance] == reader[distance:]
        before, after = line[:-distance][same], line[distance:][same]
        pairs += [before * len(items) + after, after * len(items) + before]
        weights += [np.full(len(before), 1 / distance), np.full(len(before), 0.5 / distance)]
    cells, inverse = np.unique(np.concatenate(pairs), return_inverse=True)
    values = np.bincount(inverse, np.concatenate(weights), len(cells))
    rows, columns = np.divmod(cells, len(items))
    chosen = np.bincount(line, minlength=len(items))
    values = values / (np.sqrt(chosen[rows] * chosen[columns]) + _SHRINKAGE)
    best_first = np.lexsort((columns, -values, rows))
    rows, columns, values = rows[best_first], columns[best_first], values[best_first]
    kept = np.arange(len(rows)) - np.searchsorted(rows, rows) < _NEIGHBOURS
    return {
        "idle": torch.tensor(np.where(np.isnan(idle), np.nanmedian(idle), idle), dtype=torch.float),
        "starts": torch.tensor(np.searchsorted(rows[kept], np.arange(len(items) + 1))),
        "columns": torch.tensor(columns[kept], dtype=torch.int32),
        "values": torch.tensor(values[kept], dtype=torch.float),
    }


def learn_tastes(
    model: "MemGPTForRecommendation", index: "Index", read: list[list[str]], directory: Path, epochs: int, seed: int
) -> None:
    """Learn from choices what the texts do not say: an offset to each item's vector, and a head that reads histories of
    such vectors, starting as the text head. The whole catalogue, or a sample of it, competes for the next item, since
    its texts are already encoded. Changes `index.tastes` and writes the head's weights into the model directory.

    Offsets are dropped at random, so that the texts of items added later are in the same space.
    """
    import copy

    import torch
    from safetensors.torch import save_file
    from torch.nn.functional import cross_entropy, dropout, normalize
    from tqdm import tqdm

    from memgpt.model.kernels import multiplies_bfloat16
    from memgpt.predict.recommendation import TASTE_HISTORY, TASTES

    bf16 = multiplies_bfloat16(torch.device("cpu"))
    place = {item: position for position, item in enumerate(index.ids)}
    lines = [[place[item] for item in line] for line in read]
    runs = [
        line[max(0, last - TASTE_HISTORY - 1) : last] for line in lines for last in range(len(line), 1, -TASTE_HISTORY)
    ]
    torch.manual_seed(seed)
    head = copy.deepcopy(model.head).float().train()
    offsets = torch.zeros_like(index.vectors, requires_grad=True)
    groups = [{"params": head.parameters(), "lr": 2e-3}, {"params": [offsets], "lr": 1.6e-2}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps = epochs * -(-len(runs) // 32)
    if not steps:
        return
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 50, 1 - step / steps))
    order = (chosen for _ in range(epochs) for chosen in torch.randperm(len(runs)).split(32))
    for chosen in tqdm(order, desc="tastes", total=steps, unit="step", leave=False, disable=None):
        history = torch.zeros((len(chosen), TASTE_HISTORY), dtype=torch.long)
        target = torch.full((len(chosen), TASTE_HISTORY), -1)
        for row, run in enumerate(runs[number] for number in chosen.tolist()):
            history[row, : len(run) - 1] = torch.tensor(run[:-1])
            target[row, : len(run) - 1] = torch.tensor(run[1:])
        kept = torch.rand(len(offsets), 1) > 0.1
        vectors = normalize(index.vectors + offsets * kept, dim=-1)
        interest = head.encode_reader(dropout(vectors[history], 0.2))[target >= 0]
        wanted = target[target >= 0]
        competing = torch.arange(len(place))
        if len(place) > _COMPETING:
            competing = torch.cat([wanted, torch.randint(len(place), (_COMPETING,))]).unique()
        candidates, places = vectors[competing], torch.searchsorted(competing, wanted)
        loss = torch.zeros(())
        # In pieces: all logits at once would need newly allocated memory pages in each step.
        for part, right in zip((interest / head.temperature).split(_PIECE), places.split(_PIECE), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                logits = part @ candidates.T
            loss = loss + cross_entropy(logits.float(), right, reduction="sum") / len(wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    index.tastes = normalize(index.vectors + offsets.detach(), dim=-1)
    save_file(head.state_dict(), directory / TASTES)


def fit_weights(predictor: "Predictor", rows: list[dict[str, Any]]) -> dict[str, float]:
    """The weights of the signals that maximise the probability of the items that came next, in a softmax over the items
    not yet read. Convex, with a small penalty on large weights; with a large catalogue fewer readers are used."""
    import torch

    from memgpt.predict.recommendation import SIGNALS

    rows = [row for row in rows if row["input"]["history"]]
    rows = rows[: max(100, _CELLS // len(predictor.place))]
    if not rows:
        return {name: float(name == "match") for name in SIGNALS}
    signals, seen = [], []
    for row in rows:
        signals.append(predictor.signals(row["input"]["history"]))
        seen.append(torch.zeros(len(predictor.place), dtype=torch.bool))
        seen[-1][[predictor.place[item] for item in row["input"]["history"]]] = True
    features, mask = torch.stack(signals), torch.stack(seen)
    target = torch.tensor([predictor.place[row["item_id"]] for row in rows])
    weights = torch.zeros(len(SIGNALS), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = (features @ weights).masked_fill(mask, -torch.inf)
        value = torch.nn.functional.cross_entropy(logits, target) + 1e-3 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return {name: round(weight, 6) for name, weight in zip(SIGNALS, weights.tolist(), strict=True)}


def test_rows(tables: Path, split: str = "test") -> list[dict[str, Any]]:
    """One per reader: the history, and the item that came next."""
    before = histories(tables, "train") if split == "validation" else histories(tables, "train", "validation")
    rows = sorted(rows_of(tables, "recommendation", split), key=lambda row: row["user_id"])
    return [
        {"input": {"history": before.get(row["user_id"], []), "k": DEPTH}, "item_id": row["item_id"]} for row in rows
    ]


def statistics(rows: list[dict[str, Any]], predictions: list[list[dict[str, Any]]]) -> np.ndarray:
    """Per reader: NDCG@10, which with one right answer is 1 / log2(rank + 1), and the count 1."""
    ranks = _ranks(rows, predictions)
    gain = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0.0)
    return np.stack([gain, np.ones(len(rows))], axis=1)


def score(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def metrics(rows: list[dict[str, Any]], predictions: list[list[dict[str, Any]]]) -> dict[str, float]:
    ranks = _ranks(rows, predictions)
    return {
        PRIMARY: float(score(statistics(rows, predictions).sum(0))),
        "recall_at_1": float((ranks <= 1).mean()),
        "recall_at_10": float((ranks <= 10).mean()),
        "recall_at_50": float((ranks <= 50).mean()),
        "mrr_at_50": float((1 / ranks).mean()),
    }


def apart(
    tables: Path, rows: list[dict[str, Any]], predictions: list[list[dict[str, Any]]], predictor: "Predictor"
) -> dict[str, float]:
    """Metrics that need more than rows and answers: of the ranking by text match only, and of the first ten offered.

    coverage_at_10: share of the catalogue that is offered to anyone. novelty_at_10: mean self-information of the items
    offered, log2(readers / those who chose it) in bits (Zhou et al. 2010); an item never chosen counts as chosen once.
    """
    by_text = predictor.predict([{**row["input"], "rerank": False} for row in rows])
    chosen = counts(tables)
    readers = len(histories(tables, "train"))
    offered = [item["item_id"] for prediction in predictions for item in prediction[:10]]
    bits = [np.log2(readers / max(1, chosen[item])) for item in offered]
    return {
        **{f"text_{name}": value for name, value in metrics(rows, by_text).items()},
        "coverage_at_10": len(set(offered)) / len(predictor.place),
        "novelty_at_10": float(np.mean(bits)) if bits else 0.0,  # readers of everything are offered nothing
    }


def baseline(tables: Path, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The most popular items that the reader has not read yet."""
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
    """cold: readers whose next item was chosen at most `_COLD` times in train; cold_readers: with few items read."""
    chosen = counts(tables)
    return {
        "cold": np.array([chosen[row["item_id"]] <= _COLD for row in rows], dtype=bool),
        "cold_readers": np.array([len(row["input"]["history"]) <= _COLD for row in rows], dtype=bool),
    }


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
