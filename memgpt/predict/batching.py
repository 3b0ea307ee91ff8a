"""Running a model over many texts of unequal length."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TOKENS_PER_BATCH = 8192  # padding included


def by_length(rows: Sequence[Sequence[int]], tokens: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Indices of rows in batches of similar length, longest first, each of at most `tokens` tokens with padding."""
    order = sorted(range(len(rows)), key=lambda row: (-len(rows[row]), row))
    batch: list[int] = []
    for row in order:
        if batch and (len(batch) + 1) * len(rows[batch[0]]) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[Any], window: int | None = None) -> list[list[int]]:
    """Texts → their token ids, truncated to `window`; what looks like a special token is read as text."""
    if not texts:  # the tokenizer does not accept an empty list
        return []
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [row[:window] for row in ids]


def batch_size(model: PreTrainedModel) -> int:
    """Tokens per batch; for a bfloat16 model on a CPU as many as stay in the processor's cache."""
    return 2048 if model.device.type == "cpu" and model.dtype == torch.bfloat16 else TOKENS_PER_BATCH


def pad(rows: Sequence[Sequence[int]], value: int, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Rows of ids → input_ids and attention_mask [B, T]; an empty row becomes one attended padding token."""
    width = max(1, *(len(row) for row in rows)) if rows else 1
    ids = torch.full((len(rows), width), value)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : max(1, len(row))] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
