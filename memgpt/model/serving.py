"""Faster inference with a trained model: half-precision or 8-bit weights, grouped attention, compiled code.

The model computes the same function; how far its numbers may differ is documented and tested. An accelerated model is
for inference only, and its weights are rounded irreversibly: save the original. With 8-bit weights, or compiled to
generate, it refuses to be saved.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import CompileConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from memgpt.model.kernels import float8, multiplies_bfloat16
from memgpt.model.unpadded import unpad

WEIGHTS = ("float32", "bfloat16", "int8", "float8")
_FEW = 64  # up to this many rows, reading the weights takes longer than multiplying by them
_LARGEST = 448.0  # of the 8-bit floats
_SHORT = 96  # up to this many tokens, one product for a whole group is faster than the blocks of sdpa


def accelerate(
    model: PreTrainedModel, weights: str = "bfloat16", compile: bool = False, padding: bool = True
) -> PreTrainedModel:
    """Prepare a model for inference, in place; it is called, and generates, as before.

    weights: "float32" leaves them; "bfloat16" halves their size; "int8" and "float8" also round the matrices of trunk
    and output to 8 bits with a scale per row. "int8" rounds less, and is faster on a CPU for few tokens at once
    (decoding). "float8" is multiplied in 8 bits by GPUs from Ada on; elsewhere it only saves memory.
    compile: compile the step of `generate` over a static cache, or the trunk of a model that does not generate. Later
    changes of weights or hooks may have no effect. Compiling takes 15 to 60 s at the first calls, and again for another
    number of texts to generate, or another total length of prompt and answer that `generation_config.max_cache_len`
    does not cover. padding: False makes the trunk of a model that does not generate read a batch's texts without their
    padding, which is for GPUs (`memgpt.model.unpadded`).

    Raises:
        ValueError: if weights is unknown, or padding=False for a model that generates.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: expected one of {', '.join(WEIGHTS)}")
    model.eval().requires_grad_(False)
    if weights != "float32":
        if not multiplies_bfloat16(model.device):
            warnings.warn(f"weights={weights!r}: slow on this {model.device.type}, which lacks bfloat16", stacklevel=2)
        for parameter in model.parameters():  # not `model.to`, which would also round the rotary frequencies
            parameter.data = parameter.data.to(torch.bfloat16)
        model.config.dtype = torch.bfloat16
    if rounded := {"int8": Int8Linear, "float8": Float8Linear}.get(weights):
        for module in [*model.base_model.modules(), model]:
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, rounded(child))
    if model.config._attn_implementation == "sdpa" and model.device.type == "cpu":
        model.set_attn_implementation("grouped_sdpa")
    if not padding:
        unpad(model)
    if compile:
        _compile(model)
    if rounded or (compile and model.can_generate()):  # before any file is written
        model.save_pretrained = _refuse_to_save
    return model


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    raise ValueError("accelerate: a model compiled to generate, or with 8-bit weights, is not saved; save it before")


def _compile(model: PreTrainedModel) -> None:
    # Skip the guards that check at each call whether modules changed: they take a tenth of a decoding step. Without
    # them nothing distinguishes two models of the same shape, so each needs its own code (`isolate_recompiles`).
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    if not model.can_generate():
        if model.device.type == "cpu":  # packs the weights for the processor once, not at every product
            options["freezing"] = True
        model.base_model.compile(dynamic=True, isolate_recompiles=True, options=options)
        return
    if model.device.type == "cuda":  # there a step consists of many small kernels
        options["triton.cudagraphs"] = True
    settings = CompileConfig(fullgraph=False, mode=None, options=options)
    settings.isolate_recompiles = True  # passed to torch.compile like the declared fields
    settings._compile_all_devices = True  # by default transformers compiles on GPUs only
    model.generation_config.cache_implementation = "static"
    model.generation_config.compile_config = settings


class _RoundedLinear(nn.Module):
    """A linear layer whose weight [out, in] is stored in 8 bits, with a scale per output."""

    def __init__(self, linear: nn.Linear, largest: float, rounded: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1).clamp(min=1e-12) / largest).to(torch.bfloat16)
        # Divided by the stored, rounded scale: if that was rounded down, the largest value exceeds the range, so clamp.
        # Not named `weight`: a plain linear layer would load it as its weights, without the scales.
        self.rounded_weight = nn.Buffer(rounded((weight / scale[:, None].float()).clamp(-largest, largest)))
        self.scale = nn.Buffer(scale)
        self.bias = linear.bias

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [n, in] → [n, out]. Here the weight is widened to a type that the processor multiplies natively."""
        wide = rows.dtype if multiplies_bfloat16(rows.device) else torch.float32
        weight = self.rounded_weight.to(wide) * self.scale[:, None].to(wide)
        return nn.functional.linear(rows.to(wide), weight).to(rows.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.product(x.reshape(-1, x.shape[-1]))
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], -1)


class Int8Linear(_RoundedLinear):
    """Stores the weight as int8 (symmetric, rounded to nearest).

    Activations stay bfloat16, so the only additional error is that of the weights, at most 1/254 of a row's largest.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear, 127, lambda scaled: scaled.round().to(torch.int8))
        # The kernel reads 16 inputs at a time, and beyond the end if fewer are left.
        self.packed = self.rounded_weight.device.type == "cpu" and self.rounded_weight.shape[1] % 16 == 0

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        if self.packed and rows.shape[0] <= _FEW:
            return torch._weight_int8pack_mm(rows.contiguous(), self.rounded_weight, self.scale)
        return super().product(rows)


class Float8Linear(_RoundedLinear):
    """Stores the weight as 8-bit floats with 3 bits of mantissa (e4m3; arXiv 2209.05433).

    A weight changes by at most 1/16 of itself or, if tiny, 1/450,000 of its row's largest. On GPUs that multiply such
    floats, activations are rounded likewise, with a scale per token; elsewhere they stay bfloat16.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear, _LARGEST, lambda scaled: scaled.to(torch.float8_e4m3fn))
        self.eighth = linear.weight.is_cuda and float8.available() and float8.fits(linear.weight)
        self.one = nn.Buffer(torch.ones((), device=linear.weight.device))

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.eighth:
            return super().product(rows)
        # The scales are applied outside the product, so that it is of the kind that all these GPUs support.
        scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12).float() / _LARGEST
        rounded = (rows / scale).to(torch.float8_e4m3fn)
        out = torch._scaled_mm(rounded, self.rounded_weight.t(), self.one, self.one, out_dtype=torch.bfloat16)
        return (out * scale * self.scale).to(rows.dtype)


def grouped_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa for CPUs, except that few queries (short texts, decoding) are multiplied per group, in one
    product with their shared key and value head. sdpa would copy these heads, and so the cache, for every query head.

    query [B, H, T, W], key and value [B, G, S, W], attention_mask [B or 1, 1, T, S] (boolean, true: seen; or additive)
    → [B, T, H, W].
    """
    batch, heads, length, width = query.shape
    if length > _SHORT or (length > 1 and is_causal and attention_mask is None):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
        )
    groups, times = key.shape[1], heads // key.shape[1]
    query = (query * scaling).transpose(1, 2).reshape(batch, length, groups, times, width)
    query = query.transpose(1, 2).reshape(batch, groups, length * times, width)
    scores = (query @ key.transpose(2, 3)).view(batch, groups, length, times, -1)
    if attention_mask is not None:
        mask = attention_mask[:, :, :, None]
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else (scores + mask).clamp(min=least)
    output = scores.softmax(dim=-1).view(batch, groups, length * times, -1) @ value
    return output.view(batch, groups, length, times, width).transpose(1, 2).reshape(batch, length, heads, width), None


ALL_ATTENTION_FUNCTIONS.register("grouped_sdpa", grouped_sdpa)
ALL_MASK_ATTENTION_FUNCTIONS.register("grouped_sdpa", sdpa_mask)
