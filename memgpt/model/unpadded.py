"""Texts of unequal length read without padding, applied to a finished encoder from outside.

The trunk reads the texts of a batch as one row, one after the other, and gives their states back where the batch had
them. Attention goes text by text: on a GPU in one call of torch's kernel (in 16 bits, from Ampere on), which has not
been run; on a CPU in a loop, which tells what the kernel has to compute and saves no time.
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
    """Have an encoder's trunk leave out what `attention_mask` hides, in place; its states there are zero.

    Raises:
        ValueError: for a model that generates.
    """
    if model.can_generate():
        raise ValueError("padding=False is for models that read; one that generates has a cache of even rows")
    model.set_attn_implementation("text_by_text")
    trunk: nn.Module = model.base_model
    trunk.register_forward_pre_hook(_pack, with_kwargs=True)
    trunk.register_forward_hook(_unpack, with_kwargs=True)
    return model


@torch.compiler.disable  # sizes depend on the mask
def _pack(trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """input_ids and attention_mask [B, T] → the N tokens that are kept, [1, N], and where they were. Other calls than
    the heads' stay as they are."""
    others = ("inputs_embeds", "position_ids", "past_key_values")
    if kwargs.get("attention_mode") != "bidirectional" or any(kwargs.get(name) is not None for name in others):
        return None
    ids, mask = args[0] if args else kwargs["input_ids"], kwargs.get("attention_mask")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    lengths = kept.sum(1)
    packed = {
        "input_ids": ids[kept][None],
        "position_ids": (kept.cumsum(1) - 1)[kept][None],
        "attention_mask": {GLOBAL: None, LOCAL: None},  # nothing to make one of
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


def text_by_text(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """For transformers' attention interface. query [1, H, N, W], key and value [1, G, N, W] of texts that begin and
    end at cu_seq_lens_q → [1, N, H, W]; sdpa outside of the trunk, where these are not given."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    reach = -1 if sliding_window is None else sliding_window  # to either side
    if not query.is_cuda:
        return _loop(query, key, value, scaling, reach, cu_seq_lens_q), None
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
        window_size=(reach, reach),
        enable_gqa=True,
    )
    return found[None], None


@torch.compiler.disable
def _loop(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, reach: int, ends: torch.Tensor
) -> torch.Tensor:
    """What the kernel computes."""
    found = []
    for start, end in pairwise(ends.tolist()):
        place = torch.arange(end - start)
        near = (place[:, None] - place).abs() <= (reach if reach >= 0 else end)
        q, k, v = (heads[:, :, start:end] for heads in (query, key, value))
        found.append(nn.functional.scaled_dot_product_attention(q, k, v, near, scale=scaling, enable_gqa=True))
    return torch.cat(found, dim=2).transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register("text_by_text", text_by_text)
ALL_MASK_ATTENTION_FUNCTIONS.register("text_by_text", sdpa_mask)
