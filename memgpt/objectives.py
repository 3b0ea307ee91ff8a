"""What pretraining minimises: next tokens, masked tokens, or both in turn, on rows of packed documents."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from memgpt.config import Pretrain

KEPT, RANDOM = 0.1, 0.1  # of the chosen tokens, these stay as they are or become any other (BERT, arXiv 1810.04805)


class Pretraining:
    """Causal and masked next-token prediction with one head (GPT-BERT, arXiv 2410.24159).

    A batch is read causally, or, in a share of the steps that moves from `masked_share_start` to `masked_share_end`, in
    both directions with `mask_fraction` of its tokens hidden. Either way the hidden state at position t predicts the
    token at t + 1. What a step draws depends on seed and step alone, so that a resumed run draws the same.
    """

    def __init__(self, params: Pretrain, steps: int, vocab_size: int, mask_token_id: int):
        self.params, self.steps = params, steps
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id
        self.loss: Callable[..., torch.Tensor] = next_token_loss
        if params.compile:
            self.loss = torch.compile(next_token_loss, dynamic=False)

    def __call__(self, model: PreTrainedModel, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        """Loss of a training step on input_ids and position_ids, both [B, T]."""
        draw = torch.Generator().manual_seed(self.params.seed * 1_000_003 + step)
        share = torch.lerp(
            torch.tensor(self.params.masked_share_start),
            torch.tensor(self.params.masked_share_end),
            step / max(1, self.steps - 1),
        )
        ids, positions, z_loss = batch["input_ids"], batch["position_ids"], self.params.z_loss
        if torch.rand((), generator=draw) >= share:
            return self.loss(model, ids, positions, ids, z_loss)
        shown, labels = mask(ids, positions, self.params.mask_fraction, self.mask_token_id, self.vocab_size, draw)
        return self.loss(model, shown, positions, labels, z_loss, attention_mode="bidirectional")


def next_token_loss(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    labels: torch.Tensor,
    z_loss: float,
    **mode: Any,
) -> torch.Tensor:
    """Mean of −log p(labels[t + 1] | hidden[t]) over labels [B, T] other than −100, plus `z_loss` · (log Z)², which
    keeps the logits' normaliser Z near 1 (PaLM, arXiv 2204.02311, section 5)."""
    logits = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **mode).logits[:, :-1].float()
    targets = labels[:, 1:]
    log_z = logits.logsumexp(-1)
    chosen = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    counted = targets != -100
    losses = log_z - chosen + z_loss * log_z.square()
    return losses.where(counted, 0.0).sum() / counted.sum().clamp(min=1)


def mask(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    fraction: float,
    mask_token_id: int,
    vocab_size: int,
    draw: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids [B, T] → (what is shown, labels): `fraction` of the tokens hidden, never a document's first."""
    device = input_ids.device
    hidden = (torch.rand(input_ids.shape, generator=draw) < fraction).to(device) & (position_ids > 0)
    fate = torch.rand(input_ids.shape, generator=draw).to(device)
    other = torch.randint(vocab_size, input_ids.shape, generator=draw).to(device)
    shown = input_ids.masked_fill(hidden & (fate >= KEPT + RANDOM), mask_token_id)
    shown = torch.where(hidden & (fate < RANDOM), other, shown)
    return shown, input_ids.masked_fill(~hidden, -100)
