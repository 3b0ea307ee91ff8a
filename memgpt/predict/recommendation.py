"""A reader's history → the items to offer next, by the items' texts and by the behaviour of all readers.

A model directory holds its item index, so that items are encoded once and can be added without training: `items.json`
(ids, titles, how often each was chosen, the weights of the ranking) and `items.safetensors` (the tensors of `Index`).
`tastes.safetensors` has the weights of the head that derives a reader's taste from the history.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memgpt.model import MemGPTForRecommendation
from memgpt.model.residency import Residency, load
from memgpt.predict.batching import batch_size, by_length, encode, pad

INDEX, VECTORS, TASTES = "items.json", "items.safetensors", "tastes.safetensors"
SIGNALS = ("match", "taste", "popularity", "recency", "follows", "covisits")
LATEST = 10  # latest items of a history whose co-visited items count
TASTE_HISTORY = 50  # latest items of a history that determine a reader's taste


@dataclass
class Index:
    """The catalogue of N items.

    vectors [N, P]: encoded texts. tastes [N, P]: the same, plus offsets learned from readers' choices.
    counts: how often each was chosen in train. idle [N]: days since it was last chosen; for an item never chosen the
    median, which is neutral. starts [N + 1], columns, values: a sparse matrix of co-visitation (CSR): how near in the
    history, and how often, readers of the row's item chose the column's.
    weights: of the `SIGNALS`, learned on validation; None ranks by text match only.
    """

    ids: list[str]
    titles: list[str]
    counts: list[int]
    vectors: torch.Tensor
    tastes: torch.Tensor
    idle: torch.Tensor
    starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    weights: dict[str, float] | None = None

    @classmethod
    def read(cls, directory: Path) -> "Index":
        parts: dict[str, Any] = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        parts.update(load_file(directory / VECTORS))
        return cls(**parts)

    def write(self, directory: Path) -> None:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        named = {name: value for name, value in vars(self).items() if name not in tensors}
        save_file(tensors, directory / VECTORS)
        (directory / INDEX).write_text(json.dumps(named, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def item_text(title: str, description: str = "", tags: str = "") -> str:
    """The text of an item that the model reads."""
    return " ".join(part.strip() for part in (title, description, tags.replace("|", ", ")) if part and part.strip())


@torch.no_grad()
def item_vectors(model: MemGPTForRecommendation, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Texts → unit vectors [N, P]."""
    rows = encode(tokenizer, texts, model.config.window)
    vectors = torch.zeros(len(rows), model.config.pooled_size)
    for batch in by_length(rows, batch_size(model)):
        arguments = pad([rows[i] for i in batch], tokenizer.pad_token_id, model.device)
        vectors[batch] = model.encode_item(**arguments).float().cpu()
    return vectors


def build_index(
    model: MemGPTForRecommendation,
    tokenizer: PreTrainedTokenizerFast,
    items: list[dict[str, str]],
    counts: dict[str, int],
    directory: Path,
    behaviour: dict[str, Any] | None = None,
) -> None:
    """Write the index of `items` ({item_id, title, description, tags}) into a model directory.

    behaviour: idle, starts, columns and values of `Index`; None: zeros, as nothing is known.
    """
    nothing: dict[str, Any] = {
        "idle": torch.zeros(len(items)),
        "starts": torch.zeros(len(items) + 1, dtype=torch.long),
        "columns": torch.zeros(0, dtype=torch.int32),
        "values": torch.zeros(0),
    }
    vectors = _vectors_of(model, tokenizer, items)
    Index(
        ids=[item["item_id"] for item in items],
        titles=[item["title"] for item in items],
        counts=[counts.get(item["item_id"], 0) for item in items],
        vectors=vectors,
        tastes=vectors.clone(),
        **(behaviour or nothing),
    ).write(directory)


def extend_index(
    model: MemGPTForRecommendation, tokenizer: PreTrainedTokenizerFast, items: list[dict[str, str]], directory: Path
) -> int:
    """Add those of `items` whose id is not yet in the index of a model directory; returns how many.

    Nobody has chosen them yet, so they are ranked by their texts. Existing items keep their vectors and places.
    """
    index = Index.read(directory)
    known = set(index.ids)
    new = [item for item in items if item["item_id"] not in known]
    if new:
        index.ids += [item["item_id"] for item in new]
        index.titles += [item["title"] for item in new]
        index.counts += [0] * len(new)
        vectors = _vectors_of(model, tokenizer, new)
        index.vectors, index.tastes = torch.cat([index.vectors, vectors]), torch.cat([index.tastes, vectors])
        index.idle = torch.cat([index.idle, index.idle.median().expand(len(new))])
        index.starts = torch.cat([index.starts, index.starts[-1:].expand(len(new))])
        index.write(directory)
    return len(new)


def _vectors_of(
    model: MemGPTForRecommendation, tokenizer: PreTrainedTokenizerFast, items: list[dict[str, str]]
) -> torch.Tensor:
    return item_vectors(model, tokenizer, [item_text(i["title"], i["description"], i["tags"]) for i in items])


class Predictor:
    def __init__(self, directory: Path | str, device: str = "cpu", memory: Residency = "resident"):
        directory = Path(directory)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = load(MemGPTForRecommendation, directory, memory).to(device).eval()
        self.device = device
        self.index = Index.read(directory)
        self.taste = copy.deepcopy(self.model.head).float()
        if (directory / TASTES).exists():
            self.taste.load_state_dict(load_file(directory / TASTES))
        self.place = {item: place for place, item in enumerate(self.index.ids)}
        self.chosen = torch.tensor(self.index.counts, dtype=torch.float)

    @torch.no_grad()
    def predict(self, inputs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Per reader {history: [item id | text], k, candidates?: [item id | text], rerank?}: the best k items, as
        {item_id, title, score}.

        History runs from oldest to newest. A string that is no known id is read as the text of a new item; an empty one
        is ignored. Without candidates the whole index is ranked, except items already read; candidates are ranked as
        given, each once. rerank=False ranks by text match only. A reader without history gets the most popular items.
        """
        inputs = [{**row, "history": [item for item in row["history"] if item.strip()]} for row in inputs]
        new = self._encode_new(inputs)
        answers = []
        for row in inputs:
            history, candidates = list(row["history"]), row.get("candidates")
            names = self.index.ids if candidates is None else list(dict.fromkeys(candidates))
            weights = self.index.weights if row.get("rerank", True) else None
            if not history:
                ratings = torch.log1p(self._of_items(self.chosen, candidates, 0.0)) - torch.log1p(self.chosen.sum())
            elif weights is None:
                ratings = self._similarity(history, candidates, new)
            else:
                ratings = self.signals(history, candidates, new) @ torch.tensor([weights[name] for name in SIGNALS])
            seen = set(history) if candidates is None else set()
            best: list[dict[str, Any]] = []
            for place in torch.sort(ratings, descending=True, stable=True).indices.tolist():
                if len(best) == int(row.get("k", 10)):
                    break
                if names[place] not in seen:
                    known = self.place.get(names[place])
                    item_id, title = (None, names[place]) if known is None else (names[place], self.index.titles[known])
                    best.append({"item_id": item_id, "title": title, "score": round(ratings[place].item(), 6)})
            answers.append(best)
        return answers

    @torch.no_grad()
    def signals(
        self,
        history: list[str],
        candidates: list[str] | None = None,
        new: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The SIGNALS of each of C candidates, by default the whole index: [C, len(SIGNALS)].

        new: vectors of the texts in history and candidates that are no known ids.
        """
        idle = self._of_items(self.index.idle, candidates, self.index.idle.median().item() if self.place else 0.0)
        near = torch.zeros(2, len(self.place))
        for distance, item in enumerate(reversed(history[-LATEST:]), start=1):
            if item in self.place:
                row = slice(*self.index.starts[self.place[item] : self.place[item] + 2].tolist())
                near[1].index_add_(0, self.index.columns[row], self.index.values[row] / distance)
            if distance == 1:
                near[0] = near[1]
        return torch.stack(
            [
                *(
                    self._similarity(history, candidates, new or {}, by_taste)
                    / self.model.config.similarity_temperature
                    for by_taste in (False, True)
                ),
                torch.log1p(self._of_items(self.chosen, candidates, 0.0)),
                -torch.log1p(idle),
                *(self._of_items(torch.log1p(100 * one), candidates, 0.0) for one in near),
            ],
            dim=1,
        )

    def _similarity(
        self,
        history: list[str],
        candidates: list[str] | None,
        new: dict[str, torch.Tensor],
        by_taste: bool = False,
    ) -> torch.Tensor:
        """Cosine similarity of the reader's interest and each candidate [C], by text or by taste."""
        head, vectors = (self.taste, self.index.tastes) if by_taste else (self.model.head, self.index.vectors)
        length = TASTE_HISTORY if by_taste else self.model.config.max_history

        def vector(item: str) -> torch.Tensor:
            return vectors[self.place[item]] if item in self.place else new[item]

        latest = torch.stack([vector(item) for item in history[-length:]])[None]
        latest = latest.to(self.device, head.item.weight.dtype)
        interest = head.encode_reader(latest)[0, -1].float().cpu()
        if candidates is None:
            return vectors @ interest
        chosen = [vector(item) for item in dict.fromkeys(candidates)]
        return torch.stack(chosen) @ interest if chosen else interest[:0]

    def _of_items(self, values: torch.Tensor, candidates: list[str] | None, otherwise: float) -> torch.Tensor:
        """The `values` [N] of the candidates [C]; `otherwise` for one that is no known id."""
        if candidates is None:
            return values
        places = [self.place.get(item) for item in dict.fromkeys(candidates)]
        return torch.tensor([otherwise if place is None else values[place].item() for place in places])

    def _encode_new(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = sorted(
            {
                text
                for row in inputs
                for text in (*row["history"], *(row.get("candidates") or ()))
                if text not in self.place
            }
        )
        return dict(zip(texts, item_vectors(self.model, self.tokenizer, texts), strict=True)) if texts else {}
