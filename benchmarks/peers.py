"""The models that the core is measured against, made from transformers' own classes, and what each costs.

Cost is the number of multiply-adds per token in a forward pass with a sequence of `CONTEXT` tokens: every matrix that
a token passes through, the output matrix included, and attention over half the context (causal) or all of it.
"""

from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from memgpt.model import PRESETS, MemGPTConfig, MemGPTForCausalLM

CONTEXT = 256
VOCABULARY = 8192
LAYERS = 6


def memgpt(width: int, rows: int = 0, **changes: Any) -> MemGPTForCausalLM:
    """MemGPT of a width; its feed-forward layers fill up what a Llama-shaped model of that width costs. rows=0 makes
    it plain."""
    heads = max(2, width // 32)
    shape: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=CONTEXT * 4,
        memory_layers=[] if not rows else None,
        memory_rows=rows or 1,
        memory_dim=32,
    )
    shape.update(changes)
    return _filled_up(shape, multiply_adds(llama(width)))


def preset(name: str, memory: bool = True) -> MemGPTForCausalLM:
    """A preset of the product; or it without memory, with feed-forward layers that fill up what the memory costs."""
    shape = {**PRESETS[name], "vocab_size": VOCABULARY}
    if memory:
        return MemGPTForCausalLM(MemGPTConfig(**shape))
    with torch.device("meta"):
        budget = multiply_adds(preset(name))
    shape["memory_layers"] = []
    return _filled_up(shape, budget)


def _filled_up(shape: dict[str, Any], budget: int) -> MemGPTForCausalLM:
    """With the widest feed-forward layers that stay within so many multiply-adds."""
    for intermediate in range(4 * shape["hidden_size"], 16, -16):
        fitted = MemGPTConfig(**{**shape, "intermediate_size": intermediate})
        with torch.device("meta"):
            cost = multiply_adds(MemGPTForCausalLM(fitted))
        if cost <= budget:
            return MemGPTForCausalLM(fitted)
    raise ValueError(f"width {shape['hidden_size']}: no feed-forward layer fits into {budget} multiply-adds")


def llama(width: int) -> LlamaForCausalLM:
    """Llama's shape: full multi-head attention, SwiGLU of 8/3 of the width."""
    heads = max(2, width // 32)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=round(width * 8 / 3 / 16) * 16,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=CONTEXT * 4,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def bert(width: int) -> BertForMaskedLM:
    """BERT's shape: learned positions, norm after each layer, GELU of four times the width. Without its dropout, as the
    others are: no text is seen twice."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=LAYERS,
            num_attention_heads=max(2, width // 32),
            max_position_embeddings=CONTEXT * 2,
            pad_token_id=0,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def multiply_adds(model: PreTrainedModel) -> int:
    """Per token, in a forward pass over `CONTEXT` tokens. Look-ups multiply nothing."""
    matrices = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv1d)
    )
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    seen = CONTEXT if model.config.model_type == "bert" else CONTEXT // 2
    return matrices + config.num_hidden_layers * 2 * config.num_attention_heads * width * seen
