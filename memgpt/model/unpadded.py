"""Texts of unequal length concatenated in one row: a batch without its padding, or packed documents.

Attention is computed text by text: on a GPU in one call of torch's kernel (in 16 bits, from Ampere on), on a CPU in a
loop, which is the kernel's reference and saves no time. `unpad` makes a trained encoder read this way; pretraining on a
GPU uses `in_one_row`.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memgpt.model.config import GLOBAL, LOCAL


def unpad(model: PreTrainedModel) -> PreTrainedModel:
    """Make an encoder's trunk skip the tokens that `attention_mask` hides, in place; their hidden states are zero.

    Raises:
        ValueError: if the model generates.
    """
    if model.can_generate():
        raise ValueError("padding=False is for models that read; one that generates has a cache of even rows")
    model.set_attn_implementation("text_by_text")
    trunk: nn.Module = model.base_model
    trunk.register_forward_pre_hook(_pack, with_kwargs=True)
    trunk.register_forward_hook(_unpack, with_kwargs=True)
    return model


@torch.compiler.disable  # the sizes depend on the mask's values
def _pack(trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """input_ids and attention_mask [B, T] → the N kept tokens, [1, N], and the mask of their places. Calls that are not
    those of the heads are left unchanged."""
    others = ("inputs_embeds", "position_ids", "past_key_values")
    if kwargs.get("attention_mode") != "bidirectional" or any(kwargs.get(name) is not None for name in others):
        return None
    ids, mask = args[0] if args else kwargs["input_ids"], kwargs.get("attention_mask")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    lengths = kept.sum(1)
    packed = {
        "input_ids": ids[kept][None],
        "position_ids": (kept.cumsum(1) - 1)[kept][None],
        "attention_mask": {GLOBAL: None, LOCAL: None},  # the trunk then makes no masks
        "cu_seq_lens_q": nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        "max_length_q": int(lengths.max()),
        "kept": kept,
    }
    return (), {**kwargs, **packed}


@torch.compiler.disable
def _unpack(trunk: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> BaseModelOutputWithPast | None:
    if "kept" not in kwargs:
        return None
    found = output.last_hidden_state[0]
    states = found.new_zeros(*kwargs["kept"].shape, found.shape[-1])
    states[kwargs["kept"]] = found
    return BaseModelOutputWithPast(last_hidden_state=states)


def in_one_row(input_ids: torch.Tensor, position_ids: torch.Tensor) -> dict[str, Any]:
    """Packed rows [B, T], whose position_ids restart at 0 with each document and each row → the arguments, [1, B·T],
    with which `MemGPTModel` reads them under "text_by_text"."""
    rows, length = input_ids.shape
    positions = position_ids.flatten()
    starts = (positions == 0).nonzero()[:, 0]
    # Padded with empty texts to one of few sizes, because each size is compiled separately.
    room = 1 << max(2 * rows, len(starts)).bit_length()
    return {
        "input_ids": input_ids.reshape(1, -1),
        "position_ids": positions[None],
        "attention_mask": {GLOBAL: None, LOCAL: None},  # the trunk then makes no masks
        "cu_seq_lens_q": nn.functional.pad(starts, (0, room - len(starts)), value=len(positions)).int(),
        "max_length_q": length,
    }


def text_by_text(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    is_causal: bool = False,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """For transformers' attention interface. query [1, H, N, W], key and value [1, G, N, W] of texts whose boundaries
    are cu_seq_lens_q → [1, N, H, W]; without these boundaries, sdpa."""
    if cu_seq_lens_q is None:
        kwargs["is_causal"] = is_causal
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    before = (
        -1 if sliding_window is None else sliding_window - (1 if is_causal else 0)
    )  # causally, the window includes the token itself
    window = before, 0 if is_causal else before
    if not query.is_cuda or query.dtype == torch.float32:
        return _loop(query, key, value, scaling, window, cu_seq_lens_q), None
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))
    found: Any = varlen_attn(
        query,
        key,
        value,
        cu_seq_q=cu_seq_lens_q,
        cu_seq_k=cu_seq_lens_q,
        max_q=max_length_q,
        max_k=max_length_q,
        scale=scaling,
        window_size=window,
        enable_gqa=True,
    )
    return found[None], None


@torch.compiler.disable
def _loop(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    window: tuple[int, int],
    ends: torch.Tensor,
) -> torch.Tensor:
    """The same as the kernel. window: how many tokens before and after a token it sees; −1: all."""
    found = []
    for start, end in pairwise(ends.tolist()):
        before, after = (end - start if side < 0 else side for side in window)
        place = torch.arange(end - start, device=query.device)
        distance = place[:, None] - place
        near = (distance <= before) & (distance >= -after)
        q, k, v = (heads[:, :, start:end] for heads in (query, key, value))
        found.append(nn.functional.scaled_dot_product_attention(q, k, v, near, scale=scaling, enable_gqa=True))
    return torch.cat(found, dim=2).transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register("text_by_text", text_by_text)
ALL_MASK_ATTENTION_FUNCTIONS.register("text_by_text", sdpa_mask)
