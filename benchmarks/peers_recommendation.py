"""The peers for recommendation: popularity, item-kNN, EASE and SASRec.

Each is a function from the readers' training histories (lines of item indices 0..N-1, oldest first) to a scorer:
history → scores of the N items [N]. The caller excludes items that the reader has already read.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

Lines = Sequence[Sequence[int]]
Scorer = Callable[[Sequence[int]], np.ndarray]


def popularity(lines: Lines, items: int) -> Scorer:
    chosen = _chosen(lines, items)
    return lambda history: chosen


def item_knn(lines: Lines, items: int, neighbours: int = 100, latest: int = 1_000_000, shrinkage: float = 10) -> Scorer:
    """Item-kNN (Sarwar et al. 2001): shrunk cosine similarity of the items' readers, summed over the `latest` items of
    a history; each item has at most `neighbours` neighbours."""
    near = _readers(lines, items)
    near = near.T @ near
    norm = np.sqrt(np.diag(near))
    np.fill_diagonal(near, 0)
    near /= norm[:, None] * norm[None] + shrinkage
    if neighbours < items:
        least = -np.partition(-near, neighbours, axis=1)[:, neighbours]
        near[near <= least[:, None]] = 0
    return lambda history: near[list(history[-latest:])].sum(0)


def ease(lines: Lines, items: int, penalty: float = 500, latest: int = 1_000_000) -> Scorer:
    """Embarrassingly shallow autoencoder (Steck 2019, equation 8): B = I − P / diag(P), P = (XᵀX + λI)⁻¹, on
    the `latest` items of a history."""
    read = _readers(lines, items)
    inverse = np.linalg.inv(read.T @ read + penalty * np.eye(items, dtype=np.float32))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return lambda history: weights[list(history[-latest:])].sum(0)


def sasrec(
    lines: Lines,
    items: int,
    width: int = 128,
    layers: int = 2,
    length: int = 50,
    epochs: int = 20,
    dropout: float = 0.2,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    seed: int = 1,
) -> Scorer:
    """Self-attentive sequential recommendation (Kang and McAuley 2018), with the softmax over the whole catalogue
    instead of one sampled negative, which makes it a stronger peer (Klenitskiy and Vasilev 2023). It is as wide as the
    core with which it is compared."""
    torch.manual_seed(seed)
    model = _SASRec(items, width, layers, length, dropout).train()
    runs = [line[max(0, last - length - 1) : last] for line in lines for last in range(len(line), 1, -length)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    steps = epochs * -(-len(runs) // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), 1 - step / steps)
    )
    for _ in range(epochs):
        for chosen in torch.randperm(len(runs)).split(batch_size):
            history = torch.full((len(chosen), length), items)
            target = torch.full((len(chosen), length), -100)
            for row, run in enumerate(runs[index] for index in chosen.tolist()):
                history[row, : len(run) - 1] = torch.tensor(run[:-1])
                target[row, : len(run) - 1] = torch.tensor(run[1:])
            asked = target >= 0
            loss = nn.functional.cross_entropy(model(history)[asked] @ model.item.weight[:items].T, target[asked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()

    @torch.no_grad()
    def score(history: Sequence[int]) -> np.ndarray:
        if not len(history):
            return _chosen(lines, items)
        interest = model(torch.tensor([list(history[-length:])]))[0, -1]
        return (model.item.weight[:items] @ interest).numpy()

    return score


class _SASRec(nn.Module):
    def __init__(self, items: int, width: int, layers: int, length: int, dropout: float):
        super().__init__()
        self.item = nn.Embedding(items + 1, width, padding_idx=items)
        self.position = nn.Embedding(length, width)
        block = nn.TransformerEncoderLayer(
            width, max(1, width // 32), width, dropout, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.item.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, history: torch.Tensor) -> torch.Tensor:
        """Item indices [B, H], oldest first, padded at the end → predicted next item of each position [B, H, width]."""
        length = history.shape[1]
        hidden = self.dropout(self.item(history) + self.position.weight[:length])
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.blocks(hidden, mask=mask, is_causal=True)


def _chosen(lines: Lines, items: int) -> np.ndarray:
    return np.bincount([item for line in lines for item in line], minlength=items).astype(np.float32)


def _readers(lines: Lines, items: int) -> np.ndarray:
    """Which reader chose which item [readers, items], 0 or 1."""
    read = np.zeros((len(lines), items), dtype=np.float32)
    for row, line in enumerate(lines):
        read[row, list(line)] = 1
    return read
