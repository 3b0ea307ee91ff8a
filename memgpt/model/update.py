"""Learning new text without forgetting: train only the memory rows that it reads more often than the old text did.

After *Continual Learning via Sparse Memory Finetuning* (arXiv 2510.15103). An address depends only on token ids, so the
rows that a text reads are known before training. Row 0, which n-grams without a row read, is counted but never trained.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from memgpt.model.memory import KnowledgeMemory

USAGE_FILE = "memory_usage.safetensors"
_LARGEST = (1 << 32) - 1  # counts are stored in 32 bits; larger ones are clamped


def memories(model: PreTrainedModel) -> dict[int, KnowledgeMemory]:
    """Index of the block → its memory.

    Raises:
        ValueError: if the model has none.
    """
    found = {i: layer.memory for i, layer in enumerate(model.base_model.layers) if layer.memory is not None}
    if not found:
        raise ValueError("memory_layers is empty: the model has no memory to read or to update")
    return found


def table(model: PreTrainedModel) -> torch.nn.Parameter:
    """The weight of the table that all memory layers read, [rows, M].

    Raises:
        ValueError: if the model has none.
    """
    memories(model)
    return model.base_model.memory_table.weight


@torch.no_grad()
def addresses(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Rows that a batch reads: input_ids [B, T], and position_ids if documents are packed → [B, T, R]."""
    ids, positions = batch["input_ids"], batch.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1])[None]
    hash_ = model.base_model.ngram_hash
    return hash_(ids.to(model.device), positions.to(model.device))[:, hash_.lead :]


def count_rows(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """How often the batches read each row of the memory table: int64 [rows]."""
    size = len(table(model))
    counts = torch.zeros(size, dtype=torch.int64)
    for batch in batches:
        counts += addresses(model, batch).flatten().bincount(minlength=size).cpu()
    return counts


def save_usage(counts: torch.Tensor, directory: Path | str) -> None:
    """Save counts [rows] in the directory of the model that was trained on the counted text."""
    save_file({"counts": counts.clamp(max=_LARGEST).to(torch.uint32)}, Path(directory) / USAGE_FILE)


def load_usage(directory: Path | str) -> torch.Tensor:
    """Counts [rows] over all text that the model in `directory` was trained on.

    Raises:
        ValueError: if none were saved there.
    """
    path = Path(directory) / USAGE_FILE
    if not path.is_file():
        raise ValueError(f"{path}: not found; without it nothing tells which rows the model needs: pretrain it again")
    return load_file(path)["counts"].to(torch.int64)


def surplus(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """How strongly each row distinguishes the new text from the old, from counts [rows] of both:

        p_new · log(p_new / p_old),  p_new = new / Σ new,  p_old = (old + 1) / Σ (old + 1).

    This is the row's term of the Kullback-Leibler divergence: how often the new text reads the row, times a weight that
    falls with how often the old text does, as in tf-idf. It is positive where the new text reads the row more often.
    """
    p_new = new / new.sum().clamp(min=1)
    p_old = (old + 1) / (old + 1).sum()
    return torch.where(new > 0, p_new * torch.log(p_new / p_old), 0.0)


def choose_rows(new: torch.Tensor, old: torch.Tensor, share: float) -> torch.Tensor:
    """The rows to train, bool [rows]: of those that the new text reads, the `share` with the largest `surplus`.

    Rows that the new text does not read more often than the old are excluded, however large the share.

    Raises:
        ValueError: if the counts differ in size, or share is outside (0, 1].
    """
    if new.shape != old.shape:
        raise ValueError(f"memory usage: {len(old)} rows were counted, the model's table has {len(new)}")
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: expected a number above 0 and at most 1")
    score = surplus(new, old)
    score[0] = 0.0
    best = score.topk(max(1, round(share * int((new[1:] > 0).sum()))))
    chosen = torch.zeros(len(new), dtype=torch.bool)
    chosen[best.indices] = best.values > 0
    return chosen


def restrict_to_memory(model: PreTrainedModel, rows: torch.Tensor | None = None) -> None:
    """Freeze everything except the memory table. If `rows`, bool [rows], is given, also freeze the table's other rows.

    Frozen rows and weights stay bit-identical as long as the optimizer changes nothing whose gradient is zero, so the
    table must have no weight decay. Call this once per model, before creating the optimizer.
    """
    model.requires_grad_(False)
    weight = table(model)
    weight.requires_grad_(True)
    if rows is not None:
        weight.register_hook(_Keep(rows.to(weight.device)))


class _Keep:
    """Gradient hook of the table: keeps the gradient of `rows`; that of others becomes zero, or absent if sparse."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        if not gradient.is_sparse:
            return gradient.masked_fill(~self.rows[:, None], 0.0)
        gradient = gradient.coalesce()
        kept = self.rows[gradient.indices()[0]]
        return torch.sparse_coo_tensor(
            gradient.indices()[:, kept],
            gradient.values()[kept],
            gradient.shape,
            is_coalesced=True,
            check_invariants=False,
        )
