"""The models with which the core is compared, built from transformers' own classes, and their cost.

Cost is the number of multiply-adds per token in a forward pass over a sequence of `CONTEXT` tokens: all matrices that a
token passes, including the output matrix, and attention over half the context (causal) or all of it (bidirectional).
"""

from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from memgpt.model import PRESETS, MemGPTConfig, MemGPTForCausalLM

CONTEXT = 256
VOCABULARY = 8192
LAYERS = 6


def memgpt(width: int, rows: int = 0, **changes: Any) -> MemGPTForCausalLM:
    """MemGPT of a width, with feed-forward layers that make it cost as much as a Llama-shaped model of that width.
    rows=0: without memory."""
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
    """A MemGPT preset; or the same without memory, with feed-forward layers widened to equal cost."""
    shape = {**PRESETS[name], "vocab_size": VOCABULARY}
    if memory:
        return MemGPTForCausalLM(MemGPTConfig(**shape))
    with torch.device("meta"):
        budget = multiply_adds(preset(name))
    shape["memory_layers"] = []
    return _filled_up(shape, budget)


def _filled_up(shape: dict[str, Any], budget: int) -> MemGPTForCausalLM:
    """The model of `shape` with the widest feed-forward layers within a budget of multiply-adds."""
    for intermediate in range(4 * shape["hidden_size"], 16, -16):
        fitted = MemGPTConfig(**{**shape, "intermediate_size": intermediate})
        with torch.device("meta"):
            cost = multiply_adds(MemGPTForCausalLM(fitted))
        if cost <= budget:
            return MemGPTForCausalLM(fitted)
    raise ValueError(f"width {shape['hidden_size']}: no feed-forward layer fits into {budget} multiply-adds")


def llama(width: int) -> LlamaForCausalLM:
    """Llama's shape: full multi-head attention, SwiGLU of 8/3 the width."""
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
    """BERT's shape: learned positions, norm after each layer, GELU of four times the width. Without dropout, like the
    other models, because no text is seen twice."""
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
    """Multiply-adds per token in a forward pass over `CONTEXT` tokens. Look-ups cost none."""
    matrices = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv1d)
    )
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    seen = CONTEXT if model.config.model_type == "bert" else CONTEXT // 2
    return matrices + config.num_hidden_layers * 2 * config.num_attention_heads * width * seen
