"""Attention masks for each kind of layer, in the form that the attention back end expects."""

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from memgpt.model.config import GLOBAL, LOCAL, MemGPTConfig

Masks = dict[str, torch.Tensor | None]


def make_masks(
    mode: str,
    packed: bool,
    prefix_mask: torch.Tensor | None,
    *,
    config: MemGPTConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | Masks | None,
    position_ids: torch.Tensor,
    **shared: Any,
) -> Masks:
    """A mask for each kind in `config.layer_types`. mode and prefix_mask: as in `MemGPTModel.forward`.

    packed: position_ids that restart at 0 mark documents. shared: further arguments of transformers' mask functions.

    Raises:
        ValueError: if the mode is unknown, lacks its prefix_mask, or is not supported by the attention back end.
    """
    if isinstance(attention_mask, dict):  # made by `generate` for a static cache
        return attention_mask
    if "flash" in (config._attn_implementation or ""):
        _check_flash(mode, packed and inputs_embeds.shape[0] > 1)
    shared |= {"config": config, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
    kinds = sorted(set(config.layer_types or ()))
    if mode == "bidirectional":
        if packed:
            document = (position_ids == 0).cumsum(1).expand(inputs_embeds.shape[0], -1)
            shared["and_mask_function"] = lambda b, h, q, kv: document[b, q] == document[b, kv]
        both = {GLOBAL: create_bidirectional_mask, LOCAL: create_bidirectional_sliding_window_mask}
        return {kind: both[kind](**shared) for kind in kinds}
    shared["position_ids"] = position_ids
    causal = {GLOBAL: create_causal_mask, LOCAL: create_sliding_window_causal_mask}
    if mode == "causal":
        return {kind: causal[kind](**shared) for kind in kinds}
    if mode != "prefix":
        raise ValueError(f"attention_mode={mode!r}: expected 'causal', 'bidirectional' or 'prefix'")
    if prefix_mask is None:
        raise ValueError("attention_mode='prefix': pass prefix_mask [B, T], 1 for the tokens to read both ways")
    # Generated tokens and unused cache positions after prefix_mask do not belong to the prefix.
    prefix, end = nn.functional.pad(prefix_mask.bool(), (0, 1)), prefix_mask.shape[1]
    window = config.sliding_window or 0

    def within(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return prefix[b, q.clamp(max=end)] & prefix[b, kv.clamp(max=end)]

    near = {GLOBAL: within, LOCAL: lambda b, h, q, kv: within(b, h, q, kv) & ((q - kv).abs() < window)}
    return {kind: causal[kind](**shared, or_mask_function=near[kind]) for kind in kinds}


def _check_flash(mode: str, packed_rows: bool) -> None:
    if mode == "prefix":
        raise ValueError("attention_mode='prefix': flash attention takes no such mask; use sdpa or eager")
    if packed_rows:
        raise ValueError("packed documents under flash attention: pass them as one row, or use sdpa")
