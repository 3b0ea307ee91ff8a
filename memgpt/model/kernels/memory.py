"""Kernels of the knowledge memory: look-up with row-sparse gradients, and gate and convolution in one pass.

Matrix products stay in cuBLAS; the rest is bound by memory traffic. With tables in float32 under bf16 autocast, the
plain look-up reads and writes 20 bytes per element of an entry (gather 8, a cast for each of two products 6), and 24 or
more in the backward pass (casts, their sum, then `coalesce`). `look_up` needs 6 (4 read, 2 written) and at most 6 (2
read; 4 written, only per distinct row). Uncompiled, gate and convolution with three taps take about 30 forward passes
over the hidden state. `gated_convolution` reads hidden, key and value once (a tap's neighbours come from the cache) and
writes the sum: per element 12 bytes forward, 20 backward. No additions are atomic, so results are deterministic.

Shape letters: B batch, T positions, D hidden size, R rows read per position, M width of a row, L lead (taps of the
convolution), N rows of a table.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

_LOOKED_UP = 32  # rows gathered per program
_FEW = 256  # a small program sums at most this many reads of a row; frequent n-grams have thousands, for a large one
_TILE = 1024  # elements of [positions, D] held by a program
_PROGRAMS = 528  # of the backward pass, each with its own partial sums: four per multiprocessor of an H100


def look_up(
    table: torch.Tensor, addresses: torch.Tensor, dtype: torch.dtype, found: tuple[torch.Tensor, ...] | None = None
) -> torch.Tensor:
    """table [N, M], addresses [..., R] → concatenated rows, [..., R·M], in `dtype`. found: `readers` of the addresses.

    The table's gradient is sparse, as from `nn.Embedding(sparse=True)`, but already coalesced: sorted distinct rows and
    their sums in the table's dtype, without row 0, which is padding.
    """
    with torch.cuda.device_of(table):  # Triton launches on the current device
        return _LookUp.apply(table, addresses, dtype, found)


# --- look-up


@triton.jit
def _gather(table, addresses, out, count, M: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_M)[None, :]
    inside = (places < count)[:, None] & (columns < M)
    rows = tl.load(addresses + places, mask=places < count, other=0)
    found = tl.load(table + rows[:, None] * M + columns, mask=inside)
    tl.store(out + places[:, None] * M + columns, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_reads(
    source, order, starts, chosen, out,
    M: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """out[s] = sum of source[order[i]] over starts[s] ≤ i < starts[s + 1], for the segments in `chosen` if CHOSEN, else
    for those of at most FEW elements."""
    segment = tl.program_id(0).to(tl.int64)
    if CHOSEN:
        segment = tl.load(chosen + segment)
    columns = tl.arange(0, BLOCK_M)
    first, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    if CHOSEN or end - first <= FEW:
        total = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(first, end, ROWS):
            places = start + tl.arange(0, ROWS)
            rows = tl.load(order + places, mask=places < end, other=0)
            inside = (places < end)[:, None] & (columns < M)[None, :]
            read = tl.load(source + rows[:, None] * M + columns[None, :], mask=inside, other=0)
            total += tl.sum(read.to(tl.float32), 0)
        tl.store(out + segment * M + columns, total.to(out.dtype.element_ty), mask=columns < M)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        table: torch.Tensor,
        addresses: torch.Tensor,
        dtype: torch.dtype,
        found: tuple[torch.Tensor, ...] | None,
    ) -> torch.Tensor:
        addresses, width = addresses.contiguous(), table.shape[1]
        out = table.new_empty(*addresses.shape, width, dtype=dtype)
        count, block = addresses.numel(), triton.next_power_of_2(width)
        _gather[(triton.cdiv(count, _LOOKED_UP),)](table, addresses, out, count, width, block, _LOOKED_UP)
        if ctx.needs_input_grad[0]:
            # In the forward pass, because the host waits for the number of rows; in the backward pass it waits longer.
            ctx.save_for_backward(*(found or readers(addresses.flatten())))
        ctx.table = table
        return out.flatten(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        table, rows = ctx.table, ctx.saved_tensors[0]
        values = _row_sums(gradient.reshape(-1, table.shape[1]).contiguous(), table.dtype, *ctx.saved_tensors)
        table.distinct_rows = rows
        found = torch.sparse_coo_tensor(rows[None], values, table.shape, is_coalesced=True, check_invariants=False)
        return found, None, None, None


def readers(addresses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For addresses [n]: the sorted distinct rows except 0; order and starts, of which order[starts[r] : starts[r + 1]]
    are the reads of the r-th row; and the indices r of the rows that are read often."""
    addresses, order = addresses.sort(stable=True)
    rows, counts = torch.unique_consecutive(addresses, return_counts=True)
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    if len(rows) and rows[0] == 0:
        rows, counts, starts = rows[1:], counts[1:], starts[1:]
    return rows, order, starts, (counts > _FEW).nonzero()[:, 0]


def _row_sums(
    gradient: torch.Tensor,
    dtype: torch.dtype,
    rows: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    often: torch.Tensor,
) -> torch.Tensor:
    """gradient [n, M] of the rows read, and their `readers` → the sum for each distinct row, [rows, M]."""
    width = gradient.shape[1]
    out = gradient.new_empty(len(rows), width, dtype=dtype)
    block = triton.next_power_of_2(width)
    for programs, step, chosen, warps in ((len(rows), 4, False, 1), (len(often), 64, True, 8)):
        if programs:
            _sum_reads[(programs,)](
                gradient, order, starts, often, out, width, block, step, _FEW, chosen, num_warps=warps
            )
    return out


# --- gate and convolution


@triton.jit
def _places(tile, B, T, LEAD: tl.constexpr, ROWS: tl.constexpr):
    """A tile's rows of key and value: rows, positions (negative before the text), texts, rows of hidden, validity."""
    rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
    text = rows // (T + LEAD)
    positions = rows % (T + LEAD) - LEAD
    return rows, positions, text, text * T + positions, rows < B * (T + LEAD)


@triton.jit
def _match(hidden, key, weight, D, eps):
    """Per row: normalised hidden and key, their normalising factors, and their weighted dot product."""
    hidden_scale = tl.rsqrt(tl.sum(hidden * hidden, 1) / D + eps)
    key_scale = tl.rsqrt(tl.sum(key * key, 1) / D + eps)
    hidden, key = hidden * hidden_scale[:, None], key * key_scale[:, None]
    return hidden, key, hidden_scale, key_scale, tl.sum(hidden * key * weight[None, :], 1)


@triton.jit
def _forward(
    hidden, key, value, weight, taps, position_ids, out, gates, B, T, position_stride, scale, eps,
    D: tl.constexpr, LEAD: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows, t, text, n, inside = _places(tl.program_id(0), B, T, LEAD, ROWS)
    columns = tl.arange(0, BLOCK_D)
    wide = columns < D
    real = inside & (t >= 0)
    tile = real[:, None] & wide[None, :]
    w = tl.load(weight + columns, mask=wide, other=0).to(tl.float32)
    h = tl.load(hidden + n[:, None] * D + columns[None, :], mask=tile, other=0).to(tl.float32)
    k = tl.load(key + rows[:, None] * D + columns[None, :], mask=tile, other=0).to(tl.float32)
    _, _, _, _, match = _match(h, k, w, D, eps)
    gate = 2 * tl.sigmoid(match * scale)
    at = tl.load(position_ids + text * position_stride + t, mask=real, other=0)
    mixed = tl.load(value + rows[:, None] * D + columns[None, :], mask=tile, other=0).to(tl.float32)
    for back in tl.static_range(1, LEAD + 1):
        tap = tl.load(taps + (back - 1) * D + columns, mask=wide, other=0).to(tl.float32)
        seen = tile & (at >= back)[:, None]
        earlier = tl.load(value + (rows - back)[:, None] * D + columns[None, :], mask=seen, other=0).to(tl.float32)
        mixed += tap[None, :] * earlier
    tl.store(out + n[:, None] * D + columns[None, :], (gate[:, None] * mixed).to(out.dtype.element_ty), mask=tile)
    tl.store(gates + n, gate, mask=real)


@triton.jit
def _backward(
    gradient, hidden, key, value, weight, taps, position_ids, gates, hidden_grad, key_grad, value_grad, sums,
    B, T, position_stride, scale, eps, tiles,
    D: tl.constexpr, LEAD: tl.constexpr, SUMS: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """With a = norm(h) and c = norm(k), both without their weights w, s = gate' · ∂L/∂gate / √D and m = Σ a·c·w:
    ∂h = s · (c·w − a·m/D) / rms(h), ∂k the same with a and c exchanged, ∂w = Σ s·a·c."""
    columns = tl.arange(0, BLOCK_D)
    wide = columns < D
    w = tl.load(weight + columns, mask=wide, other=0).to(tl.float32)
    which = tl.arange(0, SUMS)[:, None]  # gradient sums: first the weight's, then each tap's
    total = tl.zeros((SUMS, BLOCK_D), tl.float32)
    for tile_number in range(tl.program_id(0), tiles, tl.num_programs(0)):
        rows, t, text, n, inside = _places(tile_number, B, T, LEAD, ROWS)
        real = inside & (t >= 0)
        tile, whole = real[:, None] & wide[None, :], inside[:, None] & wide[None, :]
        h = tl.load(hidden + n[:, None] * D + columns[None, :], mask=tile, other=0).to(tl.float32)
        k = tl.load(key + rows[:, None] * D + columns[None, :], mask=tile, other=0).to(tl.float32)
        h, k, hidden_scale, key_scale, match = _match(h, k, w, D, eps)
        gate = tl.load(gates + n, mask=real, other=0)
        g = tl.load(gradient + n[:, None] * D + columns[None, :], mask=tile, other=0).to(tl.float32)
        at = tl.load(position_ids + text * position_stride + t, mask=real, other=0)
        mixed = tl.load(value + rows[:, None] * D + columns[None, :], mask=tile, other=0).to(tl.float32)
        through = gate[:, None] * g
        v_grad = through
        for back in tl.static_range(1, LEAD + 1):
            tap = tl.load(taps + (back - 1) * D + columns, mask=wide, other=0).to(tl.float32)
            seen = tile & (at >= back)[:, None]
            earlier = tl.load(value + (rows - back)[:, None] * D + columns[None, :], mask=seen, other=0).to(tl.float32)
            mixed += tap[None, :] * earlier
            total += tl.where(which == back, tl.sum(through * earlier, 0)[None, :], 0.0)
            # The gradient from a later position of the text, whose convolution read this value.
            later = inside & (t + back >= 0) & (t + back < T)
            later &= tl.load(position_ids + text * position_stride + t + back, mask=later, other=0) >= back
            late_gate = tl.load(gates + n + back, mask=later, other=0)
            late = tl.load(
                gradient + (n + back)[:, None] * D + columns[None, :], mask=later[:, None] & wide[None, :], other=0
            )
            v_grad += tap[None, :] * late_gate[:, None] * late.to(tl.float32)
        s = tl.sum(g * mixed, 1) * gate * (1 - gate / 2) * scale
        total += tl.where(which == 0, tl.sum(s[:, None] * h * k, 0)[None, :], 0.0)
        h_grad = (s * hidden_scale)[:, None] * (k * w[None, :] - h * (match / D)[:, None])
        k_grad = (s * key_scale)[:, None] * (h * w[None, :] - k * (match / D)[:, None])
        at_row = rows[:, None] * D + columns[None, :]
        tl.store(hidden_grad + n[:, None] * D + columns[None, :], h_grad.to(hidden_grad.dtype.element_ty), mask=tile)
        tl.store(key_grad + at_row, k_grad.to(key_grad.dtype.element_ty), mask=whole)  # zero before the text
        tl.store(value_grad + at_row, v_grad.to(value_grad.dtype.element_ty), mask=whole)
    own = sums + (tl.program_id(0) * SUMS + which) * D + columns[None, :]
    tl.store(own, total, mask=(which <= LEAD) & wide[None, :])


@torch.library.custom_op("memgpt::gated_convolution", mutates_args=())  # so that compiled code can call it
def gated_convolution(
    hidden: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    taps: torch.Tensor | None,
    position_ids: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`GatedMemory.gate` · `GatedMemory.convolve`: [B, T, D] in the dtype of hidden, computed in float32; and the gates
    [B, T], which the backward pass needs.

    hidden [B, T, D]; key and value [B, L + T, D], whose first L positions precede the text; weight [D]: the product of
    the two norms' weights, which occur only as this product; taps [L, D] or None; position_ids [B or 1, T].
    """
    hidden, key, value, position_ids = (t.contiguous() for t in (hidden, key, value, position_ids))
    out = torch.empty_like(hidden)
    gates = hidden.new_empty(hidden.shape[:2], dtype=torch.float32)
    shape = _Shape(hidden, value, position_ids)
    with torch.cuda.device_of(hidden):
        _forward[(shape.tiles,)](
            hidden, key, value, weight, taps, position_ids, out, gates, *shape.sizes, eps, **shape.constants
        )
    return out, gates


@gated_convolution.register_fake
def _(hidden: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = hidden.new_empty(hidden.shape)
    return out, hidden.new_empty(hidden.shape[:2], dtype=torch.float32)


@torch.library.custom_op("memgpt::gated_convolution_backward", mutates_args=())
def _gated_convolution_backward(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    taps: torch.Tensor | None,
    position_ids: torch.Tensor,
    gates: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of hidden, key and value; and those of weight and taps in one tensor, [1 + L, D], in float32."""
    gradient, hidden, key, value, position_ids = (t.contiguous() for t in (gradient, hidden, key, value, position_ids))
    shape = _Shape(hidden, value, position_ids)
    lead, width = shape.constants["LEAD"], shape.constants["D"]
    slots = triton.next_power_of_2(1 + lead)
    programs = min(shape.tiles, _PROGRAMS)
    sums = weight.new_empty(programs, slots, width, dtype=torch.float32)
    grads = torch.empty_like(hidden), torch.empty_like(key), torch.empty_like(value)
    with torch.cuda.device_of(hidden):
        _backward[(programs,)](
            gradient, hidden, key, value, weight, taps, position_ids, gates, *grads, sums,
            *shape.sizes, eps, shape.tiles, SUMS=slots, **shape.constants,
        )  # fmt: skip
    return *grads, sums[:, : 1 + lead].sum(0)


@_gated_convolution_backward.register_fake
def _(
    gradient: torch.Tensor, hidden: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    key, value, weight = others[:3]
    sums = weight.new_empty(1 + value.shape[1] - hidden.shape[1], len(weight), dtype=torch.float32)
    return hidden.new_empty(hidden.shape), key.new_empty(key.shape), value.new_empty(value.shape), sums


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, gradient: torch.Tensor, of_gates: None) -> tuple[torch.Tensor | None, ...]:
    weight, taps = ctx.saved_tensors[3:5]
    *grads, sums = _gated_convolution_backward(gradient, *ctx.saved_tensors, ctx.eps)
    return *grads, sums[0].to(weight.dtype), None if taps is None else sums[1:].to(taps.dtype), None, None


gated_convolution.register_autograd(_differentiate, setup_context=_save)


class _Shape:
    """Grid, sizes and constants with which both passes are launched."""

    def __init__(self, hidden: torch.Tensor, value: torch.Tensor, position_ids: torch.Tensor):
        batch, length, width = hidden.shape
        block = triton.next_power_of_2(width)
        rows = max(1, _TILE // block)
        self.tiles = triton.cdiv(batch * value.shape[1], rows)
        self.sizes = batch, length, 0 if len(position_ids) == 1 else length, width**-0.5
        self.constants: dict[str, int] = {
            "D": width,
            "LEAD": value.shape[1] - length,
            "BLOCK_D": block,
            "ROWS": rows,
            "num_warps": min(16, max(2, rows * block // 512)),
        }
