"""Recall's search: compares every token with those before it, without storing all pairs.

The plain code compares T tokens with the W before them as tensors of T · W numbers, in some twenty passes, unless
torch.compile fuses them (for fixed sizes). Here a program holds the comparisons of a few tokens and reads from the
cache.
"""

import torch
import triton
import triton.language as tl

_TILE = 4096  # comparisons held by a program


@triton.jit
def _longest_run(
    tokens, earlier, position_ids, best, T, columns, position_stride, window,
    LONGEST: tl.constexpr, PLACES: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    text = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    inside = t < T
    tokens, earlier = tokens + text * columns, earlier + text * columns
    found = tl.zeros((PLACES,), tl.int32)
    for first in range(0, window, BACK):
        i = first + tl.arange(0, BACK)
        run = inside[:, None] & (i < window)[None, :]
        length = tl.zeros((PLACES, BACK), tl.int32)
        for step in tl.static_range(LONGEST):
            place = LONGEST - 1 + t - step
            own = tl.load(tokens + window + place, mask=inside, other=-2)
            position = tl.load(position_ids + text * position_stride + place, mask=inside, other=0)
            other = tl.load(earlier + place[:, None] + i[None, :], mask=run, other=-1)
            run &= (own[:, None] == other) & ((window - i)[None, :] <= position[:, None])
            length += run.to(tl.int32)
        score = tl.where((i < window)[None, :], length * window + i[None, :], 0)
        found = tl.maximum(found, tl.max(score, 1))
    tl.store(best + text * T + t, found, mask=inside)


@torch.library.custom_op("memgpt::longest_run", mutates_args=())  # so that compiled code can call it
def longest_run(
    tokens: torch.Tensor, earlier: torch.Tensor, position_ids: torch.Tensor, window: int, longest: int
) -> torch.Tensor:
    """As `memgpt.model.recall.longest_run`."""
    tokens, earlier, position_ids = tokens.contiguous(), earlier.contiguous(), position_ids.contiguous()
    (texts, columns), length = tokens.shape, position_ids.shape[1] - longest + 1
    best = torch.empty(texts, length, dtype=torch.int32, device=tokens.device)
    places = min(32, triton.next_power_of_2(length))
    stride = 0 if len(position_ids) == 1 else position_ids.shape[1]
    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        _longest_run[(triton.cdiv(length, places), texts)](
            tokens, earlier, position_ids, best, length, columns, stride, window,
            longest, places, min(_TILE // places, 512),
        )  # fmt: skip
    return best


@longest_run.register_fake
def _(
    tokens: torch.Tensor, earlier: torch.Tensor, position_ids: torch.Tensor, window: int, longest: int
) -> torch.Tensor:
    return tokens.new_empty(tokens.shape[0], position_ids.shape[1] - longest + 1)
