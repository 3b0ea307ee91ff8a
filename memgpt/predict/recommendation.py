"""What a reader has read → what to offer next, by what the items say.

A model directory holds its item index: `items.json` (ids, titles and how often each was chosen) and
`items.safetensors` (their vectors), so that items are encoded once; `build_index` renews both without training.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from memgpt.model import MemGPTForRecommendation
from memgpt.model.residency import Residency, load
from memgpt.predict.batching import batch_size, by_length, pad

INDEX, VECTORS = "items.json", "items.safetensors"


def item_text(title: str, description: str = "", tags: str = "") -> str:
    """What the model reads of an item."""
    return " ".join(part.strip() for part in (title, description, tags.replace("|", ", ")) if part and part.strip())


def encode_items(tokenizer: PreTrainedTokenizerFast, texts: list[str], window: int) -> list[list[int]]:
    return (
        [
            ids[:window]
            for ids in tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        ]
        if texts
        else []
    )


@torch.no_grad()
def item_vectors(model: MemGPTForRecommendation, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Texts → unit vectors [N, P]."""
    rows = encode_items(tokenizer, texts, model.config.window)
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
) -> None:
    """Write the index of `items` ({item_id, title, description, tags}) into a model directory."""
    vectors = item_vectors(model, tokenizer, [item_text(i["title"], i["description"], i["tags"]) for i in items])
    save_file({"vectors": vectors}, directory / VECTORS)
    index = {
        "ids": [item["item_id"] for item in items],
        "titles": [item["title"] for item in items],
        "counts": [counts.get(item["item_id"], 0) for item in items],
    }
    (directory / INDEX).write_text(json.dumps(index, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


class Predictor:
    def __init__(self, directory: Path | str, device: str = "cpu", memory: Residency = "resident"):
        directory = Path(directory)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = load(MemGPTForRecommendation, directory, memory).to(device).eval()
        self.device = device
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        self.ids, self.titles = index["ids"], index["titles"]
        self.vectors = load_file(directory / VECTORS)["vectors"]
        self.popularity = torch.tensor(index["counts"], dtype=torch.float)
        self.place = {item: place for place, item in enumerate(self.ids)}

    @torch.no_grad()
    def predict(self, inputs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Per reader {history: [item id | text], k, candidates?: [item id | text]}: the best k items, as
        {item_id, title, score}.

        History runs from oldest to newest. A string that is no known id is read as the text of a new item. Without
        candidates the whole index competes, less what the reader has read; candidates compete as given, each once.
        A reader without history gets what most readers chose.
        """
        new = self._encode_new(inputs)
        answers = []
        for row in inputs:
            history = list(row["history"])
            scores, names = self._candidates(row.get("candidates"), new)
            if history:
                latest = torch.stack([self._vector(item, new) for item in history[-self.model.config.max_history :]])
                latest = latest[None].to(self.device, self.model.dtype)
                interest = self.model.head.encode_reader(latest)[0, -1].float().cpu()
                ratings = scores @ interest
            else:
                chosen = torch.tensor([self._chosen(item) for item, _ in names])
                ratings = torch.log1p(chosen) - math.log1p(float(self.popularity.sum()))
            seen = set(history) if row.get("candidates") is None else set()
            order = torch.sort(ratings, descending=True, stable=True).indices.tolist()
            best: list[dict[str, Any]] = []
            for place in order:
                if len(best) == int(row.get("k", 10)):
                    break
                item, title = names[place]
                if item is None or item not in seen:
                    best.append({"item_id": item, "title": title, "score": round(ratings[place].item(), 6)})
            answers.append(best)
        return answers

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

    def _vector(self, item: str, new: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.vectors[self.place[item]] if item in self.place else new[item]

    def _chosen(self, item: str | None) -> float:
        return self.popularity[self.place[item]].item() if item is not None else 0.0

    def _candidates(
        self, candidates: list[str] | None, new: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, list[tuple[str | None, str]]]:
        """Vectors [C, P] and (id or None, title) of what competes."""
        if candidates is None:
            return self.vectors, list(zip(self.ids, self.titles, strict=True))
        candidates = list(dict.fromkeys(candidates))
        names: list[tuple[str | None, str]] = [
            (item, self.titles[self.place[item]]) if item in self.place else (None, item) for item in candidates
        ]
        if not names:
            return self.vectors[:0], []
        return torch.stack([self._vector(item, new) for item in candidates]), names
