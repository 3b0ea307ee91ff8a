"""Continuous batching (`generate_batch` of transformers): the memory's context ids when many requests share a row.

The row concatenates the new tokens of every request. Of earlier tokens a paged cache stores only keys and values, but
the memory also needs the few ids before each token. So ids are stored beside the keys, at the same places.
"""

from typing import Any

import torch

from memgpt.model.config import GLOBAL


def context_ids(
    cache: Any,
    input_ids: torch.Tensor,
    count: int,
    *,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: dict[str, torch.Tensor],
    read_index: list[torch.Tensor],
    write_index: list[torch.Tensor],
    block_table: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """The `count` tokens before each of input_ids [1, T], a row for each: [T, count]. Stores input_ids for later calls.

    The other arguments are those that transformers passes to a paged forward: the cache places of the new tokens, and
    those of all of a request's tokens, request by request. Ids before a request's first token are arbitrary.

    Raises:
        ValueError: if the cache has no layer that keeps all tokens, or a flash attention kernel writes to it.
    """
    if GLOBAL not in cache.cache_allocators:
        raise ValueError("continuous batching with a memory needs a layer of full attention (`layer_types`)")
    if block_table is not None:
        raise ValueError("continuous batching with a memory: use sdpa, `model.set_attn_implementation('sdpa')`")
    allocator = cache.cache_allocators[GLOBAL]
    if not hasattr(allocator, "token_ids"):
        _keep_ids(allocator)
    allocator.token_ids[write_index[allocator.index]] = input_ids[0].long()
    places, ends, all_ends = read_index[allocator.index], cu_seq_lens_q, cu_seq_lens_k[GLOBAL]
    known = allocator.token_ids[places] if len(places) else input_ids[0].long()
    token = torch.arange(input_ids.shape[1], device=input_ids.device)
    request = torch.searchsorted(ends[1:].contiguous(), token.to(ends.dtype), right=True)
    request = request.clamp(max=len(ends) - 2)  # for padding after the last request
    place = all_ends[request + 1] - (ends[request + 1] - token)
    before = place[:, None] - torch.arange(count, 0, -1, device=token.device)
    return known[before.clamp(0, len(known) - 1)]


def _keep_ids(allocator: Any) -> None:
    """Add storage for each token's id to an allocator of the cache; copying a block then also copies its ids."""
    stride, copy_blocks = allocator.block_physical_stride, allocator.copy_blocks
    blocks = -(-2 * len(allocator.cache_tensor) // stride)  # a token's keys and values take two places
    allocator.token_ids = torch.zeros(blocks * stride, dtype=torch.long, device=allocator.cache_tensor.device)

    def copy(source: list[int], target: list[int]) -> None:
        copy_blocks(source, target)
        by_block = allocator.token_ids.view(-1, stride)
        by_block[target] = by_block[source]

    allocator.copy_blocks = copy
