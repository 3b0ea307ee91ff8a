"""Memory tables divided by rows among the processes of torchrun, each of which holds, looks up and trains its part.

The rest of the model is small and whole everywhere (DDP). With tables as large as memory allows, this is what lets them
grow with the number of GPUs; per step, a process sends and gets the distinct rows of its own share of the batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single
from transformers import PreTrainedModel

from memgpt.distributed import first, processes
from memgpt.environment import rank


class DividedTable(nn.Embedding):
    """Of a table [N, M] the rows from `rank` · n on, n = ⌈N / processes⌉ of them, zero past the end.

    A look-up is a collective: a process asks each owner for the distinct rows that it wants, and their gradients go
    back the same way, to be added up there and averaged over the processes, as DDP does with the rest.
    """

    whole: int  # N

    def forward(self, addresses: torch.Tensor) -> torch.Tensor:
        wanted, place = addresses.unique(return_inverse=True)  # sorted, and so by owner
        each = len(self.weight)
        sent = (wanted // each).bincount(minlength=processes())
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        to, come = sent.tolist(), received.tolist()
        asked = wanted.new_empty(sum(come))
        dist.all_to_all_single(asked, wanted, come, to)
        rows = super().forward(asked - rank() * each)
        return all_to_all_single(rows, to, come, dist.group.WORLD)[place]  # type: ignore[arg-type]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = _own(state_dict[f"{prefix}weight"], self.whole)
        super()._load_from_state_dict({**state_dict, f"{prefix}weight": own}, prefix, *args)


def divide(model: PreTrainedModel) -> None:
    """Leave each process its part of the model's memory tables, in place; the parameters stay the same objects."""
    for table in model.modules():
        if getattr(table, "_memory_table", False) and processes() > 1:
            table.__class__, table.whole = DividedTable, len(table.weight)
            table.padding_idx = None if rank() else 0
            table.weight.data = _own(table.weight.data, table.whole)
            table.weight.divided = True
            table.weight.register_hook(lambda gradient: gradient / processes())


@contextmanager
def whole(model: PreTrainedModel, optimizer: Any) -> Iterator[None]:
    """Within it the first process has the tables whole, and what the optimizer keeps of each row, in host memory."""
    kept = []
    for table in _divided(model):
        state = _row_state(optimizer, table.weight)
        kept.append((table.weight, table.weight.data, state, state["square_sum"]))
        rows, squares = _gather(table.weight.data, table.whole), _gather(state["square_sum"], table.whole)
        table.weight.data, state["square_sum"] = rows, squares
    yield
    for weight, rows, state, squares in kept:
        weight.data, state["square_sum"] = rows, squares


def keep_own(model: PreTrainedModel, optimizer: Any) -> None:
    """Of what the optimizer of a checkpoint keeps of each row, leave this process its part."""
    for table in _divided(model):
        state = _row_state(optimizer, table.weight)
        state["square_sum"] = _own(state["square_sum"], table.whole)


def join(model: PreTrainedModel) -> None:
    """Undo `divide`: the first process gets whole tables, in host memory; the others are left with their parts."""
    for table in list(_divided(model)):
        table.weight.data = _gather(table.weight.data, table.whole)
        table.__class__, table.padding_idx = nn.Embedding, 0  # type: ignore[assignment]


def _divided(model: PreTrainedModel) -> Iterator[DividedTable]:
    return (module for module in model.modules() if isinstance(module, DividedTable))


def _row_state(optimizer: Any, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    chained = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return next(part.state[weight] for part in chained.optimizers if weight in part.state)


def _own(rows: torch.Tensor, count: int) -> torch.Tensor:
    """This process's part of rows [count, …]."""
    each = -(-count // processes())
    own = rows.new_zeros(each, *rows.shape[1:])
    part = rows[rank() * each :][:each]
    own[: len(part)] = part
    return own


def _gather(own: torch.Tensor, count: int) -> torch.Tensor:
    """Everyone's parts as rows [count, …] on the host of the first process, one after the other; elsewhere `own`."""
    parts = []
    for owner in range(processes()):
        part = own.clone() if owner == rank() else torch.empty_like(own)
        dist.broadcast(part, owner)
        if first():
            parts.append(part.cpu())
    return torch.cat(parts)[:count] if first() else own
