"""Key-value caches for `generate`: those that hold less, int8 values or a window in every layer, are passed to it as
`past_key_values=`; the window of fixed size is part of its `cache_implementation="static"`."""

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
    """Holds what `quantise` packs, [B, heads, T, head_dim + 4]; cropping, reordering and the rest work on that.

    New tokens too are handed back as they are held, so that it does not matter in which pieces a text is read.
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
    """A whole text."""


class Int8WindowLayer(_Int8, DynamicSlidingWindowLayer):
    """A window of it."""


class WindowLayer(DynamicSlidingWindowLayer):
    """The last tokens of a global layer.

    Not `is_sliding`: transformers takes the sizes of all sliding layers' masks from the first that is, and this one's
    window need not be that of the local layers.
    """

    is_sliding = False


class Int8GlobalWindowLayer(_Int8, WindowLayer):
    """The same as int8."""


class StaticWindowLayer(StaticSlidingWindowLayer):
    """A window of fixed size whose length only a tensor tells, never a number in Python: a compiled step then is one
    for all lengths. transformers' own counts in Python too, so that on a GPU every step recorded a CUDA graph of its
    own, six times as slow as replaying one."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new, size = key_states.shape[2], self.max_cache_len
        if new == 1:  # what is compiled: the oldest token leaves a full window
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
        """How many past tokens new ones are shown, and where in the window the first of them is."""
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
    """An empty cache; local layers keep their `sliding_window` as ever.

    int8: keys and values as int8 with a float32 scale per token and head; an element is off by at most 1/254 of the
    largest of its head_dim. stream: the tokens that global layers keep, so that a text without end is decoded in
    constant memory. A token then sees `stream` tokens, itself included; one that is read in a piece of p tokens up to
    p − 1 more. The first tokens of the text are not kept apart: keys are held rotated by their position, so these
    would drift beyond every distance that was trained.

    Raises:
        ValueError: for a stream of fewer than 2 tokens or more than max_position_embeddings.
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
    """How many past tokens a global layer shows the next one: all of them, unless it keeps a window; 0 without one."""
    layers = [i for i, kind in enumerate(config.layer_types or ()) if kind == GLOBAL]
    if cache is None or not layers:
        return 0
    return min(cache.get_seq_length(layers[0]), max(cache.get_mask_sizes(0, i)[0] for i in layers))


def cache_bytes(cache: Cache) -> int:
    """What the keys and values of a cache take, storage that views keep alive included."""
    tensors = [t for layer in cache.layers if layer.is_initialized for t in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def kv_bytes_per_token(config: MemGPTConfig, context: int, dtype: torch.dtype, *, int8: bool = False) -> float:
    """Bytes of keys and values, over all layers, per token of a context of that many."""
    width: int = config.head_dim  # type: ignore[assignment]
    element = 2 * config.num_key_value_heads * (width + 4 if int8 else width * dtype.itemsize)
    kept = {GLOBAL: 1.0, LOCAL: min(config.sliding_window or 0, context) / context}
    return element * sum(kept[kind] for kind in config.layer_types or ())
