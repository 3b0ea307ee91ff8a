"""Converts a checkpoint of another model family to MemGPT: its weights under our names, and an empty memory.

| here                            | llama, mistral, qwen2, qwen3    | gpt2                           |
|---------------------------------|---------------------------------|--------------------------------|
| model.embed_tokens              | the same                        | transformer.wte                |
| model.embed_positions           | (rotary)                        | transformer.wpe                |
| model.layers.N                  | the same                        | transformer.h.N                |
| … attention_norm                | … input_layernorm               | … ln_1                         |
| … attention.{q,k,v}_proj        | … self_attn.{q,k,v}_proj        | … attn.c_attn, cut in three    |
| … attention.o_proj              | … self_attn.o_proj              | … attn.c_proj                  |
| … attention.{q,k}_norm          | … self_attn.{q,k}_norm (qwen3)  | (none)                         |
| … mlp_norm                      | … post_attention_layernorm      | … ln_2                         |
| … mlp.{gate,up,down}_proj       | the same                        | (none), mlp.c_fc, mlp.c_proj   |
| … memory                        | (new)                           | (new)                          |
| model.norm                      | the same                        | transformer.ln_f               |
| lm_head                         | the same                        | the same                       |

GPT-2 stores matrices as [in, out]; they are transposed. Biases are mapped like their matrices.
"""

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from memgpt.model.config import GLOBAL, LOCAL, MemGPTConfig
from memgpt.model.model import MemGPTForCausalLM
from memgpt.model.tokenizer import MASK, PAD, canonical_ids

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
_ROTARY = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_BROKEN = (OSError, ValueError, RuntimeError, KeyError, StrictDataclassError, SafetensorError)
_CHECKED_TOKENS = 128
_TOLERANCE = 1e-4  # relative to the largest logit: a wrong mapping differs by about 1, rounding by 1e-6

_NAMES = [  # parts of tensor names: source → MemGPT
    (r"^transformer\.", "model."),
    (r"\.wte\.", ".embed_tokens."),
    (r"\.wpe\.", ".embed_positions."),
    (r"\.h\.(\d+)\.", r".layers.\1."),
    (r"\.(input_layernorm|ln_1)\.", ".attention_norm."),
    (r"\.(post_attention_layernorm|ln_2)\.", ".mlp_norm."),
    (r"\.ln_f\.", ".norm."),
    (r"\.attn\.c_proj\.", ".attention.o_proj."),
    (r"\.self_attn\.", ".attention."),
    (r"\.mlp\.c_fc\.", ".mlp.up_proj."),
    (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
]


def convert(
    source: str | Path,
    directory: Path,
    *,
    memory_layers: list[int] | None = None,
    memory_rows: int | None = None,
    memory_dim: int | None = None,
    dtype: torch.dtype | None = None,
) -> MemGPTForCausalLM:
    """Write `source` with an added empty memory, and its tokenizer, to `directory`; also returns the model.

    source: a local directory or a hub id of a family in FAMILIES, with weights as safetensors. The result has the same
    logits, over the source's vocabulary and up to the rounding of `dtype` (None: the source's own).
    memory_layers: blocks with a memory; by default the first, third and fifth. memory_rows, memory_dim: by default as
    in `memory_shape`.

    The pipeline needs a padding and a mask token. They are added if the tokenizer lacks them, or pads with its end
    token. If the vocabulary has no rows for them, these become the mean of its rows. By Jensen's inequality neither can
    then be the most likely token, and each takes less than 1/V of the probability.

    Raises:
        ValueError: in one line, if the source cannot be read, has a part without a counterpart here, or the logits
            differ after the mapping.
    """
    there = _read_config(source)
    fields = _fields(source, there)
    tokenizer = _read_tokenizer(source, there)
    model_there = _read_model(source, there)
    kept = dtype or model_there.dtype
    model_there = model_there.float()
    vocab_size = max(there.vocab_size, 1 + max(tokenizer.get_vocab().values()))
    reads = {"memory_layers": memory_layers, "memory_rows": memory_rows, "memory_dim": memory_dim}
    try:
        config = MemGPTConfig(
            **fields | {key: value for key, value in reads.items() if value is not None},
            vocab_size=vocab_size,
            pad_token_id=tokenizer.pad_token_id,
            mask_token_id=tokenizer.mask_token_id,
            eos_token_id=model_there.generation_config.eos_token_id or tokenizer.eos_token_id,
        )
    except StrictDataclassError as error:
        raise ValueError(
            f"{source}: {str(error).strip().splitlines()[-1].strip().removeprefix('ValueError: ')}"
        ) from None
    rows, width = memory_shape(model_there.num_parameters(), config)
    config.memory_rows, config.memory_dim = memory_rows or rows, memory_dim or width

    model = MemGPTForCausalLM(config).eval()
    tensors = _tensors(model_there.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = _extended(tensors[name], vocab_size)
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    new = re.compile(
        r"\.memory(_table)?\.|\.ngram_hash\.|\.recall\." + (r"|^lm_head\." if config.tie_word_embeddings else "")
    )
    if lost := unexpected + [name for name in missing if not new.search(name)]:
        raise ValueError(f"{source}: {lost[0]} has no counterpart, so the logits would differ")
    model.model.ngram_hash.canonical_ids.copy_(canonical_ids(tokenizer, vocab_size))
    _check(source, model_there, model)
    for parameter in model.parameters():  # not the buffers, so that the rotary frequencies stay exact
        parameter.data = parameter.data.to(kept)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


def memory_shape(parameters: int, config: MemGPTConfig) -> tuple[int, int]:
    """(rows per hash head, width of a row) for a source of that many parameters.

    The width is a quarter of the hidden size, rounded down to a multiple of 8, from 8 to 256. The number of rows is the
    largest power of two for which the table is no larger than the source, but at least 2^10 and at most 2^20.
    """
    width = min(256, max(8, config.hidden_size // 4 // 8 * 8))
    affordable = parameters // max(1, len(config.memory_ngrams or ()) * config.memory_heads * width)
    return 1 << min(20, max(10, affordable.bit_length() - 1)), width


def _read_config(source: str | Path) -> PreTrainedConfig:
    try:
        there = AutoConfig.from_pretrained(source)
    except _BROKEN as error:
        raise ValueError(f"{source}: no configuration to be read there ({_reason(error)})") from None
    if getattr(there, "quantization_config", None) is not None:
        raise ValueError(f"{source}: quantised weights are not taken over; convert the full-precision checkpoint")
    if any(getattr(there, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise ValueError(f"{source}: a mixture of experts ({there.model_type}), which has no counterpart here")
    if there.model_type not in FAMILIES:
        raise ValueError(f"{source}: a {there.model_type} model; convert takes {', '.join(FAMILIES)}")
    return there


def _fields(source: str | Path, there: PreTrainedConfig) -> dict[str, Any]:
    """The fields of our configuration with which the backbone computes the same as the source."""
    kind = there.model_type
    shared = {
        name: getattr(there, name)
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "initializer_range",
            "tie_word_embeddings",
            "bos_token_id",
        )
    }
    if kind == "gpt2":
        if not there.scale_attn_weights or there.scale_attn_by_inverse_layer_idx or there.add_cross_attention:
            raise ValueError(
                f"{source}: scale_attn_weights=false, scale_attn_by_inverse_layer_idx and add_cross_attention have no "
                "counterpart here"
            )
        return shared | {
            "num_key_value_heads": there.num_attention_heads,
            "intermediate_size": there.n_inner or 4 * there.hidden_size,
            "qk_norm": False,
            "attention_bias": True,
            "attention_output_bias": True,
            "gated_mlp": False,
            "mlp_bias": True,
            "norm": "layer",
            "rms_norm_eps": there.layer_norm_epsilon,
            "position_embedding": "learned",
            "hidden_act": there.activation_function,
            "dropout": there.resid_pdrop,
            "attention_dropout": there.attn_pdrop,
        }
    rotary = there.rope_parameters or {}
    if rotary.get("rope_type") not in _ROTARY:
        raise ValueError(f"{source}: rope_type={rotary.get('rope_type')!r}; expected one of {', '.join(_ROTARY)}")
    if rotary.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{source}: partial_rotary_factor={rotary['partial_rotary_factor']}; only whole heads turn here"
        )
    window = None if kind == "llama" else there.sliding_window
    if kind in ("qwen2", "qwen3"):
        layer_types = there.layer_types
    else:
        layer_types = [LOCAL if window else GLOBAL] * there.num_hidden_layers
    bias = kind in ("llama", "qwen3") and there.attention_bias
    return shared | {
        "num_key_value_heads": there.num_key_value_heads,
        "head_dim": getattr(there, "head_dim", None) or there.hidden_size // there.num_attention_heads,
        "intermediate_size": there.intermediate_size,
        "layer_types": layer_types,
        "sliding_window": window,
        "qk_norm": kind == "qwen3",
        "attention_bias": bias or kind == "qwen2",
        "attention_output_bias": bias,
        "mlp_bias": kind == "llama" and there.mlp_bias,
        "hidden_act": there.hidden_act,
        "rms_norm_eps": there.rms_norm_eps,
        "rope_parameters": dict(rotary),
        "attention_dropout": there.attention_dropout or 0.0,
    }


def _read_tokenizer(source: str | Path, there: PreTrainedConfig) -> PreTrainedTokenizerFast:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=_revision(there))
    except _BROKEN as error:
        raise ValueError(f"{source}: no tokenizer to be read there ({_reason(error)})") from None
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{source}: its tokenizer has no tokenizer.json; save it in the fast format first")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{source}: its tokenizer has no end token; give eos_token in tokenizer_config.json")
    if (highest := max(tokenizer.get_vocab().values())) >= there.vocab_size:
        raise ValueError(f"{source}: its tokenizer has an id {highest}, its model a vocabulary of {there.vocab_size}")
    added = {}
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):  # the memory skips padding, but not the end token
        added["pad_token"] = PAD
    if tokenizer.mask_token_id is None:
        added["mask_token"] = MASK
    tokenizer.add_special_tokens(added)
    return tokenizer


def _read_model(source: str | Path, there: PreTrainedConfig) -> PreTrainedModel:
    try:
        model, told = AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto",
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
            revision=_revision(there),
        )
    except _BROKEN as error:
        raise ValueError(
            f"{source}: its weights cannot be loaded ({_reason(error)}); they must be whole safetensors files, pickles "
            "are not read"
        ) from None
    if told["missing_keys"]:
        raise ValueError(f"{source}: its weights lack {min(told['missing_keys'])}")
    if told["mismatched_keys"]:
        name, found, expected = min(told["mismatched_keys"])
        raise ValueError(f"{source}: {name} is {list(found)}, by its config.json it should be {list(expected)}")
    return model.eval()


def _revision(there: PreTrainedConfig) -> str:
    """The commit that the configuration came from, so that weights and tokenizer match it. Given a commit, transformers
    also does not ask the hub's bot to convert pickles."""
    return getattr(there, "_commit_hash", None) or "main"


def _tensors(there: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The source's tensors under our names; see the table above."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in there.items():
        if re.search(r"\.c_(attn|proj|fc)\.weight$", name):
            tensor = tensor.t().contiguous()
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.c_attn." in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                tensors[name.replace(".attn.c_attn.", f".attention.{part}_proj.")] = third.contiguous()
        else:
            tensors[name] = tensor
    return tensors


def _extended(rows: torch.Tensor, size: int) -> torch.Tensor:
    """rows [V, D], extended to [size, D] by copies of their mean."""
    return torch.cat((rows, rows.mean(0, keepdim=True).expand(size - len(rows), -1)))


@torch.no_grad()
def _check(source: str | Path, there: PreTrainedModel, here: MemGPTForCausalLM) -> None:
    """Compare logits on one row of random ids, in fp32, to find features that the mapping misses."""
    vocab_size = there.config.vocab_size
    length = min(_CHECKED_TOKENS, here.config.max_position_embeddings)
    ids = torch.randint(vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    expected = there(ids, use_cache=False).logits
    difference = (here(ids, use_cache=False).logits[..., :vocab_size] - expected).abs().max()
    if not difference <= _TOLERANCE * expected.abs().max().clamp(min=1):  # NaN is refused too
        raise ValueError(
            f"{source}: logits differ by {difference:.2g} after the mapping; the checkpoint is damaged or has a "
            "feature that has no counterpart here"
        )


def _reason(error: Exception) -> str:
    """The informative part of a library's error message, in one line."""
    if isinstance(error, KeyError):
        return f"unknown {error}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
