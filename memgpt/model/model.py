"""MemGPT: a Transformer backbone with an n-gram memory, and its language models; the tasks' models are in heads.py.

    h = embedding;  h += recall(h, the token that followed the last few tokens when they last occurred)
    block:  h += memory(h, n-grams)       at `config.memory_layers` only
            h += attention(norm(h))       rotary positions, grouped queries, query-key norm
            h += swiglu(norm(h))

The same weights read causally (to generate) or in both directions (to understand). The class sets the default, which a
call can override with `attention_mode`. Shape letters: B batch, T positions, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Unpack

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache, StaticSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from memgpt.model import paged
from memgpt.model.cache import StaticWindowLayer, visible_past
from memgpt.model.config import GLOBAL, LOCAL, MemGPTConfig
from memgpt.model.masks import make_masks
from memgpt.model.memory import HIDDEN, GatedMemory, KnowledgeMemory, NGramHash, RMSNorm, hide, look_up, make_table
from memgpt.model.prefix import Prefix
from memgpt.model.recall import RecallMemory
from memgpt.model.word_votes import VoteTable, WordTable

logger = logging.get_logger(__name__)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (arXiv 2104.09864): position_ids [B, T] → cos, sin [B, T, head_dim]."""

    def __init__(self, config: MemGPTConfig):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = (config.rope_parameters or {})["rope_type"]
        compute = (
            self.compute_default_rope_parameters if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        )
        inv_freq, scaling = compute(config)
        self.attention_scaling: float = scaling
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MemGPTConfig, **kwargs: Any) -> tuple[torch.Tensor, float]:
        width: int = config.head_dim  # type: ignore[assignment]
        steps = torch.arange(0, width, 2, dtype=torch.float) / width
        return 1.0 / ((config.rope_parameters or {})["rope_theta"] ** steps), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [B, heads, T, head_dim] by cos, sin [B, 1, T, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention for transformers' attention interface: (output [B, T, heads, head_dim], weights)."""
    groups: int = module.num_key_value_groups  # type: ignore[assignment]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _in_float32(attend: Callable) -> Callable:
    """`attend` computed in float32, for training on a CPU with bfloat16 instructions. There torch's backward pass of
    sdpa takes up to eight times as long in bfloat16 as in float32, most for short texts."""

    def widened(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Any:
        if isinstance(attention_mask, torch.Tensor) and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()  # sdpa requires the precision of the queries
        with torch.autocast("cpu", enabled=False):
            output, weights = attend(module, query.float(), key.float(), value.float(), attention_mask, **kwargs)
        return output.to(query.dtype), weights

    return widened


def make_norm(config: MemGPTConfig, size: int) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layer" else RMSNorm
    return kind(size, eps=config.rms_norm_eps)


class Attention(nn.Module):
    """Grouped-query self-attention over the whole text or a window; `qk_norm` RMS-normalises queries and keys."""

    def __init__(self, config: MemGPTConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim: int = config.head_dim  # type: ignore[assignment]
        self.sliding_window = config.sliding_window if (config.layer_types or ())[layer_idx] == LOCAL else None
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True  # the back ends' default if the call does not pass it
        width, bias = self.head_dim, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * width, bias=bias)
        self.o_proj = nn.Linear(
            config.num_attention_heads * width, config.hidden_size, bias=config.attention_output_bias
        )
        self.o_proj._closes_residual = True  # type: ignore[assignment]
        self.q_norm = RMSNorm(width, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        prefix: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden).view(shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden).view(shape)).transpose(1, 2)
        value = self.v_proj(hidden).view(shape).transpose(1, 2)
        if rotation is not None:
            cos, sin = rotation[0].unsqueeze(1), rotation[1].unsqueeze(1)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        query, key = query.to(value.dtype), key.to(value.dtype)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if prefix is not None:  # after the rotation, because the prefix has no position
            first_key, first_value = prefix.to(value.dtype).unsqueeze(1).expand(-1, len(value), -1, -1, -1)
            key, value = torch.cat((first_key, key), dim=2), torch.cat((first_value, value), dim=2)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if query.requires_grad and value.dtype == torch.bfloat16 and value.device.type == "cpu":
            attend = _in_float32(attend)
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden.shape[:-1], -1)), weights


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202), or the plain two-layer form of older model families."""

    def __init__(self, config: MemGPTConfig):
        super().__init__()
        sizes, bias = (config.hidden_size, config.intermediate_size), config.mlp_bias
        self.gate_proj = nn.Linear(*sizes, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(*sizes, bias=bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.down_proj._closes_residual = True  # type: ignore[assignment]
        self.act = ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(hidden)))
        return self.down_proj(self.act(self.gate_proj(hidden)) * self.up_proj(hidden))


class Block(GradientCheckpointingLayer):
    def __init__(self, config: MemGPTConfig, layer_idx: int, memory: bool):
        super().__init__()
        self.kind: str = (config.layer_types or ())[layer_idx]
        self.memory = KnowledgeMemory(config) if memory else None
        self.attention_norm = make_norm(config, config.hidden_size)
        self.attention = Attention(config, layer_idx)
        self.mlp_norm = make_norm(config, config.hidden_size)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: torch.Tensor,
        entry: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if self.memory is not None and entry is not None:
            assert position_ids is not None  # the convolution stays within a document
            if entry.shape[0] == hidden.shape[0]:  # `len` would fix the batch size of an export
                added = self.memory(hidden, entry, position_ids)
            else:  # continuous batching: one row per token
                added = self.memory(hidden.transpose(0, 1), entry, position_ids.T).transpose(0, 1)
            hidden = hidden + self.dropout(added)
        hidden = hidden + self.dropout(
            self.attention(self.attention_norm(hidden), position_ids=position_ids, **kwargs)[0]
        )
        return hidden + self.dropout(self.mlp(self.mlp_norm(hidden)))


class MemGPTPreTrainedModel(PreTrainedModel):
    config: MemGPTConfig
    config_class = MemGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Missing in older checkpoints, which have shared rows and no recall. Their initial values reproduce that.
    _keys_to_ignore_on_load_missing = [r"ngram_hash\.owners$", r"\brecall\."]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # For classes outside transformers only modules with own weights are visited, so the marks are on the leaves.
        super()._init_weights(module)
        if isinstance(module, NGramHash):
            init.copy_(module.canonical_ids, torch.arange(len(module.canonical_ids)))
            if self.config.memory_layers:
                init.zeros_(module.owners)
        if getattr(module, "_closes_residual", False):
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.weight, std=std)
        elif any(getattr(module, mark, False) for mark in ("_memory_table", "_opens_gate", "_starts_silent")):
            init.zeros_(module.weight)
        elif isinstance(module, GatedMemory) and module.lead:
            init.zeros_(module.taps)
        elif isinstance(module, Prefix):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, (VoteTable, WordTable)):
            for values in module.buffers(recurse=False):
                init.zeros_(values)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        ngram_hash, size = self.base_model.ngram_hash, embeddings.num_embeddings
        known = ngram_hash.canonical_ids[:size]
        added = torch.arange(len(known), size, device=known.device)
        ngram_hash.canonical_ids = nn.Buffer(torch.cat((known, added)))
        for module in self.modules():
            if isinstance(module, WordTable):  # the spelling of new tokens is unknown to it
                spelling = module.spelling
                module.spelling = nn.Buffer(nn.functional.pad(spelling, (0, size - len(spelling))))
        return embeddings

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers.

        Raises:
            ValueError: if the checkpoint is of another architecture, or its weights are damaged.
        """
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: damaged weights ({error}); copy the checkpoint again"
            ) from error
        if any(name.endswith(".memory.table.weight") for name in info["unexpected_keys"]):
            raise ValueError(
                f"{pretrained_model_name_or_path}: its memory layers have a table each, as they had before they shared "
                "one; pretrain it again"
            )
        return (model, info) if output_loading_info else model


class MemGPTModel(MemGPTPreTrainedModel):
    """The backbone: token ids → hidden states."""

    def __init__(self, config: MemGPTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.ngram_hash = NGramHash(config)
        self.memory_table = make_table(config) if config.memory_layers else None
        self.recall = RecallMemory(config) if config.recall_length else None
        self.layers = nn.ModuleList(
            Block(config, layer, memory=layer in (config.memory_layers or ()))
            for layer in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config, config.hidden_size)
        self.prefix = Prefix(config) if config.prefix_length else None
        learned = config.position_embedding == "learned"
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.rotary_emb = None if learned else RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        attention_mode: str = "causal",
        prefix_mask: torch.Tensor | None = None,
        context_ids: torch.Tensor | None = None,
        memory_ids: torch.Tensor | None = None,
        memory_entry: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T], or inputs_embeds [B, T, D] → last_hidden_state [B, T, D].

        attention_mode: "causal", "bidirectional", or "prefix": the tokens that prefix_mask [B, T] marks read each
        other in both directions, the rest causally. position_ids [B, T] that restart at 0 mark the documents of a
        packed row; attention and n-grams stay within them in every mode. context_ids [B, n]: the tokens before
        `input_ids` when decoding with a cache, −1 where hidden; by default those that the cache was last used with.
        memory_ids [B, T]: the tokens that inputs_embeds represent, −1 for none. Without them the memories are silent,
        also for the tokens that follow in the cache. With input_ids: these, −1 where masks made by `generate` hide
        them. [B, 0]: the memories are silent; compiled code needs this for each token after such vectors. `generate`
        passes context_ids and memory_ids. memory_entry: the result of `read_memory` for these ids, if already known.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        packed = position_ids is not None and attention_mask is None
        given: torch.Tensor = input_ids if inputs_embeds is None else inputs_embeds  # type: ignore[assignment]
        if inputs_embeds is None:
            self._check_ids(given)
            if memory_ids is None and (torch.compiler.is_compiling() or not _of_vectors(past_key_values)):
                memory_ids = input_ids
        if memory_ids is not None and not memory_ids.shape[1]:
            memory_ids = None
        # Of texts concatenated in one row, the longest counts.
        self._check_length(kwargs.get("max_length_q") or given.shape[1], past_key_values, position_ids)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(given.shape[1], device=given.device)[None] + past
        recalled = None
        if memory_ids is None and input_ids is None and self.has_memory and not torch.compiler.is_compiling():
            logger.warning_once("inputs_embeds without memory_ids, the tokens that they stand for: no memory is read")
        if memory_ids is not None and self.has_memory:
            memory_ids = hide(memory_ids, attention_mask)
            if context_ids is None and past_key_values is not None:
                context_ids = _noted_ids(past_key_values)
            read = memory_ids, position_ids, context_ids
            if "cache" in kwargs:  # continuous batching: for the memories, every token is a row of its own
                before = paged.context_ids(input_ids=memory_ids, count=self.context, **kwargs)
                read = memory_ids.T, position_ids.T, before
            if self.memory_table is not None and memory_entry is None:
                memory_entry = self.read_memory(*read)
            if self.recall is not None:
                tokens, lengths = (found.view_as(memory_ids) for found in self.recall.look_back(self.ngram_hash, *read))
                recalled = self.embed_tokens(tokens), lengths
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(given)
        masks = make_masks(
            attention_mode,
            packed,
            prefix_mask,
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if self.prefix is not None:
            masks = self.prefix.widen(masks, attention_mode)
        bidirectional = attention_mode == "bidirectional"
        if use_cache and not bidirectional and past_key_values is None:
            # After the masks, because transformers does not look for packed documents if it is given a cache.
            past_key_values = DynamicCache(config=self.config)
        hidden = inputs_embeds
        if self.embed_positions is not None:
            hidden = hidden + self.embed_positions(position_ids)
        if self.recall is not None and recalled is not None:
            hidden = hidden + self.recall(hidden, *recalled, position_ids)
        rotation = None if self.rotary_emb is None else self.rotary_emb(inputs_embeds, position_ids)
        prefix = None if self.prefix is None else self.prefix()
        # `generate(assistant_early_exit=...)` lowers num_hidden_layers.
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            hidden = layer(
                hidden,
                memory_entry,
                rotation=rotation,
                attention_mask=masks[str(layer.kind)],
                past_key_values=past_key_values,
                prefix=None if prefix is None else prefix[index],
                position_ids=position_ids,  # from these, flash attention finds packed documents
                **{"is_causal": not bidirectional, **kwargs},  # continuous batching passes its own is_causal
            )
        if past_key_values is not None:
            _note_ids(past_key_values, memory_ids, context_ids, self.context)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values if use_cache else None
        )

    @property
    def has_memory(self) -> bool:
        """Whether the model has a memory table or recall."""
        return self.memory_table is not None or self.recall is not None

    @property
    def context(self) -> int:
        """How many preceding tokens a token's memory and recall depend on."""
        return max(self.ngram_hash.context, 0 if self.recall is None else self.recall.look_back.context)

    def read_memory(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, context_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The entry that all memory layers receive, [B, lead + T, R·M]; arguments as in `forward`.

        It depends only on token ids, so a training step can read it before its compiled part. That part is then one
        graph, which it would not be otherwise: torch.compile does not support sparse gradients.
        """
        assert self.memory_table is not None
        return look_up(self.memory_table, self.ngram_hash(input_ids, position_ids, context_ids))

    def _check_ids(self, input_ids: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if input_ids.dim() != 2 or not input_ids.numel():
            raise ValueError(f"input_ids: expected [texts, tokens] with one or more of each, got {[*input_ids.shape]}")
        if input_ids.device.type != "cpu":  # there the check would synchronise at every call; the look-up fails anyway
            return
        low, high = (int(bound) for bound in input_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"input_ids: {low if low < 0 else high} is outside the vocabulary of {self.config.vocab_size}"
            )

    def _check_length(self, length: int, cache: Cache | None, position_ids: torch.Tensor | None) -> None:
        learned = self.embed_positions is not None
        if torch.compiler.is_compiling() or (not learned and GLOBAL not in (self.config.layer_types or ())):
            return  # a compiled step must not depend on the length of the cache
        if cache is not None:
            length = length + (cache.get_seq_length() if learned else visible_past(cache, self.config))
        longest, rope = self.config.max_position_embeddings, self.config.rope_parameters or {}
        scaled = (rope.get("original_max_position_embeddings") or longest) * (rope.get("factor") or 1)
        allowed = longest if learned else max(longest, scaled)
        if length > allowed and position_ids is not None:  # packed documents, or padding: the longest document counts
            length = int(position_ids.max()) + 1
        if length > allowed:
            raise ValueError(
                f"{length} tokens are more than the model's max_position_embeddings={longest}; "
                "cut the text, or read it in windows"
            )


def _note_ids(cache: Cache, ids: torch.Tensor | None, context_ids: torch.Tensor | None, count: int) -> None:
    """Store the last `count` ids on the cache, with its last layer's keys, by which `_noted_ids` detects changes."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():  # an export keeps the cache's state
        return
    if ids is not None:
        ids = ids if context_ids is None else torch.cat((context_ids, ids), dim=1)
        ids = ids[:, max(0, ids.shape[1] - count) :]
    cache.last_ids = (ids, cache.layers[-1].keys)
    cache.of_vectors = ids is None


def _of_vectors(cache: Cache | None) -> bool:
    """Whether the cache was last given vectors without ids. The memories then stay silent for the tokens after them, as
    they are without a cache (so in training), where only vectors are passed."""
    if cache is None or not getattr(cache, "of_vectors", False):
        return False
    cache.of_vectors = bool(cache.get_seq_length())  # if empty, it was reset; compiled code does not update the note
    return cache.of_vectors


def _noted_ids(cache: Cache) -> torch.Tensor | None:
    """The ids that `_note_ids` stored; None for an empty cache, or one filled from vectors without ids."""
    if torch.compiler.is_compiling():
        raise ValueError("compiled decoding with a cache: pass context_ids, the tokens before input_ids")
    ids, keys = getattr(cache, "last_ids", (None, None))
    if ids is None or not cache.get_seq_length():
        return None
    if keys is not cache.layers[-1].keys:
        raise ValueError("the cache was cut or reordered: pass context_ids, the tokens before input_ids")
    return ids


class MemGPTForCausalLM(MemGPTPreTrainedModel, GenerationMixin):
    """Predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: MemGPTConfig):
        super().__init__(config)
        self.model = MemGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,  # explicit, because `generate` looks for this parameter name
        **kwargs: Any,
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        cache = inputs.get("past_key_values")
        embedded = inputs.get("inputs_embeds")
        if embedded is not None and embedded.shape[1] == input_ids.shape[1]:  # otherwise some vectors have no token
            inputs["memory_ids"] = hide(input_ids, attention_mask)
        elif embedded is None:  # memory_ids that the caller passed belong to vectors that were already read
            inputs.pop("memory_ids", None)
        if embedded is None and _of_vectors(cache):
            inputs["memory_ids"] = input_ids[:, :0]
        elif embedded is None and cache is not None and self.model.has_memory:
            past, count = input_ids.shape[1] - inputs["input_ids"].shape[1], self.model.context
            near = min(past, count)  # to hide ids in the whole text would take longer than a decoding step
            known = hide(input_ids[:, past - near :], attention_mask)
            before = known[:, :near]
            if past < count and cache.get_seq_length() > past:  # a prompt read in pieces, or tokens of an earlier call
                if not past:
                    cache.earlier_ids = _noted_ids(cache)
                if (earlier := getattr(cache, "earlier_ids", None)) is not None:
                    before = torch.cat((earlier, before), dim=1)[:, -count:]
            # A constant shape and layout, for a compiled step.
            before = before.clone(memory_format=torch.contiguous_format)
            if before.shape[1]:
                before = nn.functional.pad(before, (count - before.shape[1], 0), value=HIDDEN)
            inputs["context_ids"] = before
            if isinstance(inputs.get("attention_mask"), dict):  # a static cache's masks do not show the hidden tokens
                inputs["memory_ids"] = known[:, near:].clone(memory_format=torch.contiguous_format)
        if inputs.get("attention_mode") == "prefix" and cache is not None:
            length = (input_ids if embedded is None else embedded).shape[1]
            if cache.get_seq_length():  # the prefix is in the cache; the tokens after it read causally
                inputs.update(attention_mode="causal", prefix_mask=None)
            elif (prefix := inputs.get("prefix_mask")) is not None and prefix[:, length:].any():
                raise ValueError(
                    "prefill_chunk_size: a piece ends within the prefix, which attention_mode='prefix' reads as one; "
                    "give a size that holds all of it, or none"
                )
            else:  # for a static cache `generate` made a causal mask, so let the model make its own
                inputs["attention_mask"] = attention_mask
        return inputs

    def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> Cache:
        cache = super()._prepare_static_cache(*args, **kwargs)
        for index, layer in enumerate(cache.layers):
            if isinstance(layer, StaticSlidingWindowLayer):
                cache.layers[index] = StaticWindowLayer(layer.max_cache_len, layer.max_cache_len)
        return cache

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        attention_mode: str = "causal",
        prefix_mask: torch.Tensor | None = None,
        context_ids: torch.Tensor | None = None,
        head_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> CausalLMOutputWithPast:
        """labels [B, T]: input_ids, −100 where nothing is predicted; they are shifted here. head_loss: computes the
        loss from last_hidden_state and the output matrix [V, D]; then no logits are returned."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            attention_mode=attention_mode,
            prefix_mask=prefix_mask,
            context_ids=context_ids,
            **kwargs,
        )
        if head_loss is not None:
            return CausalLMOutputWithPast(loss=head_loss(outputs.last_hidden_state, self.lm_head.weight))
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MemGPTForMaskedLM(MemGPTPreTrainedModel):
    """Predicts masked tokens, reading in both directions.

    Masked next-token prediction as in GPT-BERT (arXiv 2410.24159): a token is predicted from the position before it, so
    one head serves both objectives. The first token of a text is predicted from its own position; for a good prediction
    put the end token before the text, as in pretraining.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: MemGPTConfig):
        super().__init__(config)
        self.model = MemGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        attention_mode: str = "bidirectional",
        **kwargs: Unpack[TransformersKwargs],  # type: ignore[misc]
    ) -> MaskedLMOutput:
        """labels [B, T]: the masked tokens, −100 elsewhere. logits [B, T, V] predict the token at the same position."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            attention_mode=attention_mode,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        first = torch.arange(hidden.shape[1], device=hidden.device)[None] == 0
        if attention_mask is not None and attention_mask.dim() == 2:  # the first token after padding
            first = first | (nn.functional.pad(attention_mask[:, -hidden.shape[1] : -1], (1, 0)) == 0)
        if position_ids is not None:  # the first token of a document in a packed row
            first = first | (position_ids == 0)
        logits = self.lm_head(torch.where(first[..., None], hidden, hidden.roll(1, dims=1)))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
