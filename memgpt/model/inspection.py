"""Inspection of the memory: how much each n-gram contributed to a token, and how the rows of the table are used."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from memgpt.model.memory import GatedMemory, KnowledgeMemory
from memgpt.model.update import addresses, memories, table


@torch.no_grad()
def explain(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str, attention_mode: str = "causal"
) -> list[dict[str, Any]]:
    """A record per token of the text and memory layer, preceded by one for recall where a token was recalled:

    position, token: place (from 0) and text of the token. layer: index of the block, or "recall". A recall record has
    one n-gram without rows, "run → token": the run of last tokens, and the token that followed it before. gate: the
    memory's gate, in (0, 2). strength: norm of what the memory added over the norm of the hidden state it was added to.
    ngrams: a record {n, text, rows, strength} per n-gram order that reaches back no further than the end token before
    the text: the rows of the table that were read, and the strength of this part alone. The parts add up as vectors,
    together with what the convolution adds from earlier tokens.

    Raises:
        ValueError: if the model has no memory, or the text is empty.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("text: is empty; give at least one word")
    layers = memories(model)
    ids = [tokenizer.eos_token_id, *ids]  # as in training, a document starts with the end token
    input_ids = torch.tensor([ids], device=model.device)
    rows = addresses(model, {"input_ids": input_ids})
    recall = model.base_model.recall
    heard: dict[GatedMemory, tuple[torch.Tensor, ...]] = {}

    def listen(memory: GatedMemory, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        heard[memory] = (*inputs, output)

    handles = [memory.register_forward_hook(listen) for memory in [*layers.values(), *([recall] if recall else [])]]
    training = model.training
    try:
        model.eval().base_model(input_ids=input_ids, attention_mode=attention_mode, use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()

    tokens = [tokenizer.decode([token]) for token in ids]
    hash_ = model.base_model.ngram_hash
    records = []
    if recall is not None:
        hidden, followed, lengths, positions, added = heard[recall]
        gate = recall.gate(hidden, recall.entry(followed, lengths))[0, :, 0]
        strength = (added[0].norm(dim=-1) / hidden[0].norm(dim=-1)).tolist()
        found = recall.look_back(hash_, input_ids, positions)[0][0]
        for place in lengths[0, 1:].nonzero()[:, 0] + 1:
            n = int(lengths[0, place])
            run = f"{tokenizer.decode(ids[place - n + 1 : place + 1])} → {tokenizer.decode([found[place]])}"
            records.append(
                {
                    "position": int(place) - 1,
                    "token": tokens[place],
                    "layer": "recall",
                    "gate": gate[place].item(),
                    "strength": strength[place],
                    "ngrams": [{"n": n, "text": run, "rows": [], "strength": strength[place]}],
                }
            )
    for layer, memory in layers.items():
        hidden, entry, _, added = heard[memory]
        entry = entry[:, hash_.lead :]
        loudness = hidden[0].norm(dim=-1)
        gate = memory.gate(hidden, entry)[0, :, 0]
        shares = values(memory, entry, hash_.ngrams)
        parts = {n: (part[0].norm(dim=-1) * gate / loudness).tolist() for n, part in shares}
        strength = (added[0].norm(dim=-1) / loudness).tolist()
        for place in range(1, len(ids)):
            reach = [(i, n) for i, n in enumerate(hash_.ngrams) if n <= place + 1]
            records.append(
                {
                    "position": place - 1,
                    "token": tokens[place],
                    "layer": layer,
                    "gate": gate[place].item(),
                    "strength": strength[place],
                    "ngrams": [
                        {
                            "n": n,
                            "text": tokenizer.decode(ids[place - n + 1 : place + 1]),
                            "rows": rows[0, place, i * hash_.heads : (i + 1) * hash_.heads].tolist(),
                            "strength": parts[n][place],
                        }
                        for i, n in reach
                    ],
                }
            )
    return sorted(records, key=lambda record: record["position"])  # the sort is stable: layers stay in order


def values(memory: KnowledgeMemory, entry: torch.Tensor, ngrams: tuple[int, ...]) -> Iterable[tuple[int, torch.Tensor]]:
    """entry [B, T, R·M] → for each n-gram order n, its share of the value before the convolution, [B, T, D]. The shares
    sum to that value, because W_v is linear."""
    weights = memory.value.weight.chunk(len(ngrams), dim=-1)
    for n, part, weight in zip(ngrams, entry.chunk(len(ngrams), dim=-1), weights, strict=True):
        yield n, part @ weight.T


@torch.no_grad()
def usage(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """A record per n-gram order, on text given as input_ids and optional position_ids, [B, T]:

    rows: rows of this order in the table, over all heads. touched, dead: how many of them the text read, and did not
    read. expected_touched: `touched` under a perfectly even hash. unlearned: rows that are still all zero.
    ngrams: distinct n-grams (canonical ids) that read a row. load: these per row of a head. colliding: share of them
    that share their row with another, mean over heads; expected_colliding: the same under an even hash. inseparable:
    share of them that have a row of their own in no head. If rows have owners, collisions are rare.
    """
    zero = ~table(model).any(dim=1)
    hash_ = model.base_model.ngram_hash
    heads, size, base = hash_.heads, hash_.rows, len(hash_.canonical_ids) | 1
    seen: dict[int, tuple[np.ndarray, np.ndarray]] = {
        n: (np.zeros(0, np.int64), np.zeros((0, heads), np.int64)) for n in hash_.ngrams
    }
    for batch in batches:
        canonical = hash_.canonical_ids[batch["input_ids"].to(model.device)].cpu()
        rows = addresses(model, batch).cpu()
        for i, n in enumerate(hash_.ngrams):
            seen[n] = _distinct(seen[n], canonical, rows[..., i * heads : (i + 1) * heads], n, base)
    return [
        {
            "n": n,
            "rows": heads * size,
            "unlearned": int(zero[1 + i * heads * size : 1 + (i + 1) * heads * size].sum()),
            **_collisions(seen[n][1], size),
        }
        for i, n in enumerate(hash_.ngrams)
    ]


def _distinct(
    seen: tuple[np.ndarray, np.ndarray], canonical: torch.Tensor, rows: torch.Tensor, n: int, base: int
) -> tuple[np.ndarray, np.ndarray]:
    """Add a batch's n-grams, canonical ids [B, T] and their rows [B, T, heads], to (keys [N], rows [N, heads]).

    A key is the n-gram as a number in `base`, which is odd, so that a key is still a fair hash if it overflows.
    """
    key = torch.zeros_like(canonical)
    for step in range(n):
        key = key * base + canonical.roll(step, dims=1)  # n-grams that wrap around the edge have no row
    valid = (rows != 0).any(dim=-1)
    keys = np.concatenate((seen[0], key[valid].numpy()))
    keys, first = np.unique(keys, return_index=True)
    return keys, np.concatenate((seen[1], rows[valid].numpy()))[first]


def _collisions(rows: np.ndarray, size: int) -> dict[str, Any]:
    """Collision statistics for `usage`. rows [N, heads] of N distinct n-grams, in tables of `size` rows per head."""
    count, heads = rows.shape
    shared, read = np.zeros((count, heads), bool), rows != 0
    touched = 0
    for head in range(heads):
        own = read[:, head]
        _, inverse, loads = np.unique(rows[own, head], return_inverse=True, return_counts=True)
        shared[own, head] = loads[inverse] > 1
        touched += len(loads)
    free = 1 - 1 / size
    return {
        "touched": touched,
        "expected_touched": round(heads * size * (1 - free**count), 1),
        "dead": heads * size - touched,
        "ngrams": count,
        "load": count / size,
        "colliding": float(shared.mean()) if count else 0.0,
        "expected_colliding": 1 - free ** (count - 1) if count else 0.0,
        "inseparable": float((shared | ~read).all(axis=1).mean()) if count else 0.0,
    }
