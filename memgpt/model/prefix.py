"""Prefix tuning: trained keys and values that precede every text."""

import torch
from torch import nn

from memgpt.model.config import MemGPTConfig
from memgpt.model.masks import Masks


class Prefix(nn.Module):
    """Trained keys and values in every layer that all tokens of all texts see, like extra tokens before the text
    (arXiv 2101.00190). They have no position, and every sliding window includes them.

    weight: [layers, 2, key-value heads, P, head_dim].
    """

    def __init__(self, config: MemGPTConfig):
        super().__init__()
        self.config = config
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, config.prefix_length, config.head_dim)
        self.weight = nn.Parameter(torch.empty(*shape))  # type: ignore[arg-type]

    def forward(self) -> torch.Tensor:
        """The weight. It is returned by a call, so that accelerate's hooks move it to the right device."""
        return self.weight

    def widen(self, masks: Masks, mode: str) -> Masks:
        """Masks [B, 1, T, S], boolean (true: seen) or additive → [B, 1, T, P + S], in which the prefix is seen. None
        stays None: in both directions it hides nothing.

        Raises:
            ValueError: if mode is not "bidirectional", or the attention back end takes no such masks.
        """
        length, back_end = self.config.prefix_length, self.config._attn_implementation or ""
        if mode != "bidirectional":
            raise ValueError(f"attention_mode={mode!r}: a model with a prefix (prefix_length={length}) reads both ways")
        if any(kind in back_end for kind in ("flash", "flex", "text_by_text")):
            raise ValueError(f"prefix_length={length}: {back_end} takes no mask for it; use sdpa or eager")
        return {
            kind: None if mask is None else nn.functional.pad(mask, (length, 0), value=float(mask.dtype == torch.bool))
            for kind, mask in masks.items()
        }
