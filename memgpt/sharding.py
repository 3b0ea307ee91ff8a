"""Memory tables sharded by rows among the processes of torchrun, each of which holds, looks up and trains its part.

The rest of the model is small and replicated (DDP). Sharding lets the tables grow with the number of GPUs. Per step, a
process exchanges the distinct rows of its own share of the batch. Each process adds a file of its rows to a checkpoint.
Concatenated, these files are the tables, so any number of processes can read its parts from them. A single process does
the same, with one part.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single
from transformers import PreTrainedModel

from memgpt.distributed import first, processes
from memgpt.environment import rank
from memgpt.optimizers import RowAdagrad

_CHUNK_BYTES = 1 << 24
_KEPT = "square_sum"  # the optimizer's state: one number per row


class DividedTable(nn.Embedding):
    """This process's shard of a table [N, M]: n = ⌈N / processes⌉ rows from row `rank` · n on, zero past the end.

    A look-up is a collective operation: a process requests the distinct rows that it needs from their owners. The
    gradients go back the same way; owners sum them and divide by the number of processes, as DDP does elsewhere.
    """

    whole: int  # N

    def forward(self, addresses: torch.Tensor) -> torch.Tensor:
        wanted, place = addresses.unique(return_inverse=True)  # sorted, and therefore grouped by owner
        each = len(self.weight)
        sent = (wanted // each).bincount(minlength=processes())
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        to, come = sent.tolist(), received.tolist()
        asked = wanted.new_empty(sum(come))
        dist.all_to_all_single(asked, wanted, come, to)
        rows = super().forward(asked - rank() * each)
        return all_to_all_single(rows, to, come, dist.group.WORLD)[place]  # type: ignore[arg-type]


def divide(model: PreTrainedModel) -> None:
    """Reduce the model's memory tables to this process's part, in place; the parameters stay the same objects."""
    for table in model.modules():
        if not getattr(table, "_memory_table", False):
            continue
        table.whole = len(table.weight)
        if processes() > 1:
            table.__class__ = DividedTable
            table.padding_idx = None if rank() else 0
            table.weight.data = _own(table.weight.data)
            table.weight.divided = True
            table.weight.register_hook(lambda gradient: gradient / processes())


def without_tables(model: PreTrainedModel) -> dict[str, torch.Tensor] | None:
    """The model's state without the tables, which `write` writes; None if there are no such tables."""
    tables = dict(_divided(model))
    return {name: weight for name, weight in model.state_dict().items() if name not in tables} if tables else None


@contextmanager
def without_rows(model: PreTrainedModel, optimizer: Any) -> Iterator[None]:
    """Within this context the optimizer's state lacks what `write` writes."""
    states = [_state(optimizer, table) for _, table in _divided(model)]
    kept = [(state, state.pop(_KEPT)) for state in states if _KEPT in state]
    try:
        yield
    finally:
        for state, squares in kept:
            state[_KEPT] = squares


def write(model: PreTrainedModel, optimizer: Any, directory: Path) -> None:
    """Write a file to `directory` with this process's rows of the tables and the optimizer's state for each row."""
    rows = {}
    for name, table in _divided(model):
        count = max(0, min(len(table.weight), table.whole - rank() * len(table.weight)))
        rows[name] = table.weight.data[:count]
        if (squares := _state(optimizer, table).get(_KEPT)) is not None:  # it exists from the first step on
            rows[f"{name}.{_KEPT}"] = squares[:count]
    if rows:
        save_file(rows, directory / f"rows-{rank() + 1:05}-of-{processes():05}.safetensors")


def read(model: PreTrainedModel, optimizer: Any, directory: Path) -> None:
    """Read this process's rows from the files that any number of processes wrote to `directory`."""
    parts = sorted(directory.glob("rows-*.safetensors"))
    for name, table in _divided(model):
        _read(table.weight.data, name, parts)
        squares = torch.zeros(len(table.weight), device=table.weight.device)
        if _read(squares, f"{name}.{_KEPT}", parts):
            _state(optimizer, table)[_KEPT] = squares


def join(model: PreTrainedModel, place: Path) -> None:
    """Undo `divide`: the first process gets whole tables, the others keep their parts.

    A whole table is a memory-mapped, already unlinked file in the directory `place`. Its rows are read on demand, so it
    need not fit in memory.
    """
    for _, table in _divided(model):
        if processes() > 1:
            table.weight.data = _gather(table.weight.data, table.whole, place)
            table.__class__, table.padding_idx = nn.Embedding, 0


def _divided(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The tables that `divide` has processed, with the names of their weights."""
    return ((f"{name}.weight", table) for name, table in model.named_modules() if hasattr(table, "whole"))


def _state(optimizer: Any, table: nn.Embedding) -> dict[str, torch.Tensor]:
    chained = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return next(part.state[table.weight] for part in chained.optimizers if isinstance(part, RowAdagrad))


def _own(rows: torch.Tensor) -> torch.Tensor:
    """This process's part of rows [N, …]."""
    each = -(-len(rows) // processes())
    own = rows.new_zeros(each, *rows.shape[1:])
    part = rows[rank() * each :][:each]
    own[: len(part)] = part
    return own


def _read(own: torch.Tensor, name: str, parts: list[Path]) -> bool:
    """Fill this process's rows from files that together hold all rows in order. Returns whether they have `name`."""
    start, before = rank() * len(own), 0
    for part in parts:
        with safe_open(part, "pt") as file:
            if name not in file.keys():  # noqa: SIM118
                return False
            stored = file.get_slice(name)
            after = before + stored.get_shape()[0]
            for low, high in _chunks(own, max(start, before), min(start + len(own), after)):
                own[low - start : high - start] = stored[low - before : high - before]
            before = after
    return True


def _gather(own: torch.Tensor, count: int, place: Path) -> torch.Tensor:
    """All processes' parts as rows [count, M] in the first process, sent in chunks; in the others `own`."""
    whole, each = own, len(own)
    if first():
        with tempfile.NamedTemporaryFile(dir=place) as file:  # the mapping outlives the file's name
            size = count * own.shape[1]
            if hasattr(os, "posix_fallocate"):  # a full disk then raises an error here; later it would kill the process
                os.posix_fallocate(file.fileno(), 0, size * own.itemsize)
            whole = torch.from_file(file.name, shared=True, size=size, dtype=own.dtype).view(count, -1)
    for owner in range(processes()):
        start = owner * each
        for low, high in _chunks(own, start, min(start + each, count)):
            part = own[low - start : high - start] if owner == rank() else own.new_empty(high - low, own.shape[1])
            dist.broadcast(part, owner)
            if first():
                whole[low:high] = part
    return whole


def _chunks(rows: torch.Tensor, start: int, end: int) -> Iterator[tuple[int, int]]:
    """start … end in steps of at most `_CHUNK_BYTES`, which limits the memory needed beyond a process's own rows."""
    step = max(1, _CHUNK_BYTES // rows[:1].nbytes)
    return ((low, min(low + step, end)) for low in range(start, end, step))
