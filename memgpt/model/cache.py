"""Key-value caches for `generate`. Smaller ones, with int8 values or a window in every layer, are passed to it as
`past_key_values=`. `StaticWindowLayer` is used by its `cache_implementation="static"`."""

from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from memgpt.model.config import GLOBAL, LOCAL, MemGPTConfig
from memgpt.model.residency import dequantise, quantise


class _Int8(DynamicLayer):
    """Stores keys and values as packed by `quantise`, [B, heads, T, head_dim + 4]; cropping and reordering work on it.

    New tokens too are returned as rounded, so the result does not depend on the pieces in which a text is read.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys = torch.empty(0, dtype=torch.int8, device=self.device)
        self.values = torch.empty(0, dtype=torch.int8, device=self.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = super().update(quantise(key_states), quantise(value_states), *args, **kwargs)
        return dequantise(keys, self.dtype), dequantise(values, self.dtype)


class Int8Layer(_Int8):
    """The whole text, as int8."""


class Int8WindowLayer(_Int8, DynamicSlidingWindowLayer):
    """A local layer's window, as int8."""


class WindowLayer(DynamicSlidingWindowLayer):
    """The last tokens, for a global layer.

    It is not `is_sliding`, because transformers sizes the masks of all sliding layers by the first such layer, and this
    window may differ from that of the local layers.
    """

    is_sliding = False


class Int8GlobalWindowLayer(_Int8, WindowLayer):
    """The last tokens, for a global layer, as int8."""


class StaticWindowLayer(StaticSlidingWindowLayer):
    """A window of fixed size that counts its tokens in a tensor only, so one compiled step serves all lengths.
    transformers' class also counts in Python, so on a GPU every step recorded its own CUDA graph, which is six times as
    slow as replaying one."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, size = key_states.shape[2], self.max_cache_len
        if new == 1:  # the compiled case: a full window drops its oldest token
            full = self.cumulative_length >= size
            order = (torch.arange(size, device=self.device) + full) % size
            place = self.cumulative_length.clamp(max=size - 1)[None]
            for kept, states in ((self.keys, key_states), (self.values, value_states)):
                kept.copy_(kept.index_select(2, order).index_copy_(2, place, states))
            self.cumulative_length.add_(1)
            return self.keys, self.values
        past, first = self._past()
        whole = []
        for kept, states in ((self.keys, key_states), (self.values, value_states)):
            seen = torch.cat((kept[:, :, first : first + past], states), dim=2)
            kept[:, :, : past + new].copy_(seen[:, :, -size:])
            whole.append(seen)
        self.cumulative_length.add_(new)
        return whole[0], whole[1]

    def _past(self) -> tuple[int, int]:
        """How many past tokens new ones see, and the place of the first of them in the window."""
        held = min(int(self.cumulative_length), self.max_cache_len)
        past = min(held, self.max_cache_len - 1)
        return past, held - past

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        size = self.max_cache_len
        if query_length == 1:
            return size, (self.cumulative_length - size + 1).clamp(min=0)
        past, _ = self._past()
        return past + query_length, int(self.cumulative_length) - past

    def get_seq_length(self) -> Any:
        return StaticLayer.get_seq_length(self)


def make_cache(config: MemGPTConfig, *, int8: bool = False, stream: int | None = None) -> Cache:
    """An empty cache; local layers always keep their `sliding_window`.

    int8: keys and values as int8 with a float32 scale per token and head; an element is off by at most 1/254 of the
    largest of its head_dim. stream: how many tokens global layers keep, so that unbounded text is decoded in constant
    memory. A token then sees `stream` tokens, itself included; one that is read in a piece of p tokens, up to p − 1
    more. The first tokens of the text are not kept as attention sinks: keys are stored rotated by their position, so
    their distance would grow beyond all distances seen in training.

    Raises:
        ValueError: if stream is less than 2 or more than max_position_embeddings.
    """
    if stream is not None and not 2 <= stream <= config.max_position_embeddings:
        raise ValueError(
            f"stream={stream}: expected 2 to max_position_embeddings={config.max_position_embeddings} tokens"
        )
    layers: list[DynamicLayer] = []
    for kind in config.layer_types or ():
        if kind == LOCAL:
            layers.append(
                (Int8WindowLayer if int8 else DynamicSlidingWindowLayer)(sliding_window=config.sliding_window)
            )
        elif stream is not None:
            layers.append((Int8GlobalWindowLayer if int8 else WindowLayer)(sliding_window=stream))
        else:
            layers.append((Int8Layer if int8 else DynamicLayer)())
    return Cache(layers=layers)


def visible_past(cache: Cache | None, config: MemGPTConfig) -> int:
    """How many past tokens the next one sees in a global layer (all or a window); 0 without a cache or such a layer."""
    layers = [i for i, kind in enumerate(config.layer_types or ()) if kind == GLOBAL]
    if cache is None or not layers:
        return 0
    return min(cache.get_seq_length(layers[0]), max(cache.get_mask_sizes(0, i)[0] for i in layers))


def cache_bytes(cache: Cache) -> int:
    """Bytes of a cache's keys and values, including storage that views keep alive."""
    tensors = [t for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def kv_bytes_per_token(config: MemGPTConfig, context: int, dtype: torch.dtype, *, int8: bool = False) -> float:
    """Bytes of keys and values over all layers, per token of a text of `context` tokens."""
    width: int = config.head_dim  # type: ignore[assignment]
    element = 2 * config.num_key_value_heads * (width + 4 if int8 else width * dtype.itemsize)
    kept = {GLOBAL: 1.0, LOCAL: min(config.sliding_window or 0, context) / context}
    return element * sum(kept[kind] for kind in config.layer_types or ())
