"""The knowledge memory: rows of a large table, addressed by a hash of the last n tokens.

After *Conditional Memory via Scalable Lookup* (arXiv 2601.07372): an address depends only on token ids. So a look-up
needs no matrix product over the table, and rows can be prefetched. Shape letters: B batch, T positions, D hidden size,
R rows read per position, M width of a row, N rows of the table.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeGuard

import numpy as np
import torch
from torch import nn

from memgpt.model import kernels
from memgpt.model.config import MemGPTConfig

# Odd 64-bit constants (splitmix64's increment and mixers). Products wrap modulo 2^64, as intended for a hash.
_INCREMENT, _MIX_1, _MIX_2, _MASK = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, (1 << 64) - 1


def _multiplier(*key: int) -> int:
    """A fixed odd signed 64-bit number for a key, the same in every process and on every device."""
    state = 0
    for part in key:
        state = (state + (part + 1) * _INCREMENT) & _MASK
        state = ((state ^ (state >> 30)) * _MIX_1) & _MASK
        state = ((state ^ (state >> 27)) * _MIX_2) & _MASK
        state ^= state >> 31
    state |= 1
    return state - (1 << 64) if state >= 1 << 63 else state


FREE = -1  # in `NGramHash.owners`: the row has no owner
HIDDEN = -1  # replaces the id of a token that no n-gram may contain


def _fingerprint(mixed: torch.Tensor) -> torch.Tensor:
    """An n-gram's 64-bit hash → a positive number, which 1 in 32,767 others share; from other bits than its row."""
    return (1 + (mixed >> 40) % 32767).to(torch.int16)


class RMSNorm(nn.RMSNorm):
    """RMS normalisation in the weight's precision, because torch has no fast path for mixed precisions (autocast)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype))


class NGramHash(nn.Module):
    """Token ids → addresses in the memory table.

    `canonical_ids` maps a token to the one that represents all its spellings (case and leading space folded), so
    "Apple" and " apple" share entries. Row 0 of the table is always zero. It is read for n-grams that would reach
    beyond the start of a document, or that contain padding or a mask.

    `owners` holds the owner of each row. 0: shared by all n-grams that hash to it. FREE: none. Otherwise: the
    fingerprint of the one n-gram that may read it; all others read row 0. Rows start as shared; `claim` assigns them.
    """

    owners: torch.Tensor  # [N]; None without a memory

    def __init__(self, config: MemGPTConfig):
        super().__init__()
        self.ngrams = tuple(config.memory_ngrams or ())
        self.heads = config.memory_heads
        self.rows = config.memory_rows
        self.lead = max(0, config.memory_kernel - 1)
        self.blanks = tuple(t for t in (config.pad_token_id, config.mask_token_id) if t is not None)
        self.canonical_ids = nn.Buffer(torch.arange(config.vocab_size))
        owners = torch.zeros(table_rows(config), dtype=torch.int16)
        self.register_buffer("owners", owners if config.memory_layers else None)

    @property
    def context(self) -> int:
        """How many preceding tokens a token's memory depends on."""
        return max(self.ngrams, default=1) - 1 + self.lead

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, context_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Addresses [B, lead + T, R] for input_ids [B, T] and the `lead` tokens before, which the convolution reads.

        position_ids [B or 1, T] count from the start of each document. context_ids [B, ≤ context]: the tokens
        immediately before `input_ids`, for incremental decoding.
        """
        addresses = []
        for mixed, row, invalid in self._hashes(input_ids, position_ids, context_ids):
            owner = self.owners[row]
            foreign = (owner != 0) & (owner != _fingerprint(mixed))
            addresses.append(row.masked_fill(invalid | foreign, 0))
        return torch.stack(addresses, dim=-1)

    def _hashes(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, context_ids: torch.Tensor | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Per n and hash head, each [B, lead + T]: the n-gram's 64-bit hash, its row, and whether it is invalid."""
        position_ids = with_positions_before(position_ids, input_ids, context_ids, self.lead)
        length = position_ids.shape[1]
        _, ids, blank = self.with_context(input_ids, context_ids, self.context)
        reach = self.context - self.lead

        def back(tensor: torch.Tensor, steps: int) -> torch.Tensor:
            start = reach - steps
            return tensor[:, start : start + length]

        first = 1
        for n in self.ngrams:
            invalid = position_ids < n - 1
            for step in range(n):
                invalid = invalid | back(blank, step)
            for head in range(self.heads):
                mixed = torch.zeros_like(ids[:, :length])
                for step in range(n):
                    mixed = (mixed ^ (back(ids, step) + 1)) * _multiplier(n, head, step)
                    mixed = mixed ^ (mixed >> 29)
                yield mixed, first + (mixed >> 16) % self.rows, invalid
                first += self.rows

    def with_context(
        self, input_ids: torch.Tensor, context_ids: torch.Tensor | None, reach: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """input_ids [B, T] preceded by `reach` tokens, as three tensors [B, reach + T]: ids, canonical ids, and which
        are blank: missing, hidden, a mask or padding.

        Raises:
            ValueError: if buffers have no values, such as offloaded ones, which are loaded only for `forward`.
        """
        if self.canonical_ids.is_meta and not input_ids.is_meta:
            raise ValueError(
                "canonical_ids: a buffer on the meta device has no values; load the model's weights, and offload them "
                "without offload_buffers=True"
            )
        ids = input_ids if context_ids is None else torch.cat((context_ids, input_ids), dim=1)
        blank = ids == HIDDEN
        for token in self.blanks:
            blank |= ids == token
        missing = reach + input_ids.shape[1] - ids.shape[1]
        ids = nn.functional.pad(ids.clamp(min=0), (missing, 0))
        return ids, self.canonical_ids[ids], nn.functional.pad(blank, (missing, 0), value=True)

    @torch.no_grad()
    def claim(
        self, batches: Iterable[Mapping[str, torch.Tensor]], least: int, learned: torch.Tensor | None = None
    ) -> None:
        """Assign each row without an owner to the most frequent n-gram that hashes to it in `batches` (input_ids and
        position_ids, [B, T]), if that occurs at least `least` times; otherwise the row becomes FREE. learned [N]: rows
        already trained. Of these, shared ones stay shared, because what was learned in them would be lost.

        So an n-gram that was never learned reads nothing, rather than what another one has learned, and rare n-grams
        do not memorise their few continuations.
        """
        device, text = self.owners.device, [_Counts() for _ in range(len(self.ngrams) * self.heads)]
        for batch in batches:
            hashes = self._hashes(batch["input_ids"].to(device), batch["position_ids"].to(device))
            for counts, (mixed, _, invalid) in zip(text, hashes, strict=True):
                counts.add(mixed[~invalid].cpu().numpy())
        learned = torch.zeros_like(self.owners, dtype=torch.bool) if learned is None else learned.to(device)
        kept = (learned & (self.owners == 0))[1:].view(-1, self.rows)
        for counts, owners, stays in zip(text, self.owners[1:].view(-1, self.rows), kept, strict=True):
            mixed = torch.from_numpy(counts.most_frequent_last(least)).to(device)
            last = torch.full_like(owners, -1, dtype=torch.int64)  # per row, the last n-gram that hashes to it
            last.scatter_reduce_(0, (mixed >> 16) % self.rows, torch.arange(len(mixed), device=device), "amax")
            open_ = (owners <= 0) & ~stays
            owners[open_] = FREE
            given = open_ & (last >= 0)
            owners[given] = _fingerprint(mixed[last[given]])


def with_positions_before(
    position_ids: torch.Tensor, input_ids: torch.Tensor, context_ids: torch.Tensor | None, count: int
) -> torch.Tensor:
    """position_ids [B or 1, T] with those of the `count` tokens before: [B or 1, count + T]. Hidden tokens have no
    position of their own: only visible ones count, back from the row's first. context_ids None: nothing is hidden."""
    if context_ids is None:
        before = position_ids[:, :1] + torch.arange(-count, 0, device=position_ids.device)
    else:
        shown = torch.cat((context_ids, input_ids), dim=1) != HIDDEN
        place = nn.functional.pad(shown, (count - context_ids.shape[1], 0)).cumsum(1)  # a negative pad truncates
        before = (position_ids - place[:, count:]).amax(1, keepdim=True) + place[:, :count]
    return torch.cat((before, position_ids.expand(len(before), -1)), dim=1)


def hide(input_ids: torch.Tensor, attention_mask: object, token: int = HIDDEN) -> torch.Tensor:
    """input_ids [B, T] with `token` where attention_mask [B, ≥ T] is 0; masks of other forms hide nothing."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return input_ids
    return input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, token)


class _Counts:
    """How often each of many 64-bit numbers occurred."""

    def __init__(self) -> None:
        self.numbers, self.times = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.waiting: list[np.ndarray] = []

    def add(self, numbers: np.ndarray) -> None:
        self.waiting.append(numbers)
        if sum(map(len, self.waiting)) > max(1 << 22, len(self.numbers)):
            self._merge()

    def _merge(self) -> None:
        numbers, times = np.unique(np.concatenate([*self.waiting, np.zeros(0, np.int64)]), return_counts=True)
        self.waiting = []
        self.numbers, place = np.unique(np.concatenate((self.numbers, numbers)), return_inverse=True)
        self.times = np.bincount(place, np.concatenate((self.times, times)), len(self.numbers)).astype(np.int64)

    def most_frequent_last(self, least: int) -> np.ndarray:
        """The numbers that occurred at least `least` times, the most frequent last."""
        self._merge()
        enough = self.times >= least
        return self.numbers[enough][np.argsort(self.times[enough], kind="stable")]


def table_rows(config: MemGPTConfig) -> int:
    """Number of rows of the table: one of zeros, then `memory_rows` per n and hash head."""
    return 1 + len(config.memory_ngrams or ()) * config.memory_heads * config.memory_rows


def make_table(config: MemGPTConfig) -> nn.Embedding:
    """The table that all memory layers read, [N, M]."""
    table = nn.Embedding(table_rows(config), config.memory_dim, padding_idx=0)
    table._memory_table = True  # type: ignore[assignment]  # initialised to zero and trained by its own optimizer
    return table


Readers = tuple[torch.Tensor, ...]  # the addresses grouped by row, as `kernels.memory.readers` returns them


def look_up(table: nn.Module, addresses: torch.Tensor, readers: Readers | None = None) -> torch.Tensor:
    """addresses [B, T, R] → concatenated rows of the table, [B, T, R·M]. readers: the result of `find_readers`, if
    already computed."""
    if getattr(table, "sparse", False):
        return _look_up_sparsely(table, addresses, readers)
    return table(addresses).flatten(-2)


@torch.compiler.disable  # torch.compile does not support sparse gradients
def _look_up_sparsely(table: nn.Module, addresses: torch.Tensor, readers: Readers | None) -> torch.Tensor:
    if _served(table):
        from memgpt.model.kernels.memory import look_up

        device, dtype = table.weight.device.type, table.weight.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return look_up(table.weight, addresses, dtype, readers)
    return table(addresses).flatten(-2)


def find_readers(table: nn.Module, addresses: torch.Tensor) -> Readers | None:
    """The `Readers` that the kernel for a look-up's gradient needs; None if no kernel runs. The host waits for them."""
    if not (getattr(table, "sparse", False) and _served(table)):
        return None
    from memgpt.model.kernels.memory import readers

    return readers(addresses.flatten())


def _served(table: nn.Module) -> TypeGuard[nn.Embedding]:
    return type(table) is nn.Embedding and kernels.serve(table.weight)


def row_gradient(table: torch.Tensor) -> torch.Tensor:
    """The sparse gradient of a table, coalesced. The kernel's gradient already is, but autograd loses that flag.
    Sorting the rows again, and waiting for the result, would cost a twentieth of a training step."""
    gradient: torch.Tensor = table.grad  # type: ignore[assignment]
    rows = table.__dict__.pop("distinct_rows", None)
    # `rows` keeps this storage alive, so the same address means the gradient of that one look-up, with nothing added.
    if rows is not None and gradient._nnz() == len(rows) and gradient._indices().data_ptr() == rows.data_ptr():
        gradient._coalesced_(True)
    return gradient.coalesce()


class GatedMemory(nn.Module):
    """h ↦ gate(h, k) · conv(v), where k and v are projections of an entry that was looked up. kernel: taps of the
    convolution; 0 for none.

    The convolution runs before the gate, so it depends only on what was looked up, hence on token ids. Decoding
    therefore keeps no state for it. E: size of an entry.
    """

    def __init__(self, config: MemGPTConfig, entry_size: int, kernel: int):
        super().__init__()
        self.key = nn.Linear(entry_size, config.hidden_size, bias=False)
        self.value = nn.Linear(entry_size, config.hidden_size, bias=False)
        self.query_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.query_norm._opens_gate = True  # type: ignore[assignment]  # starts at zero
        self.key_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lead = max(0, kernel - 1)
        if self.lead:
            self.taps = nn.Parameter(torch.zeros(self.lead, config.hidden_size))

    def forward(self, hidden: torch.Tensor, entry: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, D], entry [B, lead + T, E], position_ids [B or 1, T] → what to add to hidden, [B, T, D]."""
        if kernels.serve(hidden) and not self.query_norm.weight.is_meta:  # offloaded weights load only in norm's call
            from memgpt.model.kernels.memory import gated_convolution

            weight, taps = self.query_norm.weight * self.key_norm.weight, self.taps if self.lead else None
            key, value, eps = self.key(entry), self.value(entry), self.query_norm.eps
            return gated_convolution(hidden, key, value, weight, taps, position_ids, eps or 0.0)[0]
        value = self.convolve(self.value(entry), position_ids)
        return self.gate(hidden, entry[:, self.lead :]) * value

    def gate(self, hidden: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
        """The factor [B, T, 1], in (0, 2), by which the context hidden [B, T, D] scales an entry [B, T, E].

        It is 1 until training moves the weight of `query_norm` from zero.
        """
        match = (self.query_norm(hidden) * self.key_norm(self.key(entry))).sum(-1, keepdim=True)
        return 2 * torch.sigmoid(match * hidden.shape[-1] ** -0.5)

    def convolve(self, value: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """value [B, lead + T, D] → [B, T, D]: each position's value plus `taps` times earlier ones in its document."""
        length = position_ids.shape[1]
        mixed = value[:, self.lead :]
        for back in range(1, self.lead + 1):
            earlier = value[:, self.lead - back :][:, :length]
            mixed = mixed + self.taps[back - 1] * earlier * (position_ids >= back)[..., None]
        return mixed


class KnowledgeMemory(GatedMemory):
    """A layer's projection of the entry read from the table at the n-grams' addresses. The table starts at zero, so the
    layer at first adds nothing, and learns only entries that lower the loss."""

    def __init__(self, config: MemGPTConfig):
        reads = len(config.memory_ngrams or ()) * config.memory_heads
        super().__init__(config, reads * config.memory_dim, config.memory_kernel)
