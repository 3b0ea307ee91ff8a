"""Training one model in several processes (`torchrun`): each process's share of a batch, and what they exchange.

transformers' Trainer wraps the model in DDP, which averages dense gradients; this module does the rest. Without
torchrun every function behaves as for a single process, and costs nothing.
"""

import os
import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from memgpt.environment import rank
from memgpt.errors import UserError


def processes() -> int:
    return int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1


def first() -> bool:
    """Whether this process is the one that prints, logs and writes."""
    return rank() == 0


def print_once(text: str) -> None:
    """Print a line on stderr, from the first process only."""
    if first():
        print(text, file=sys.stderr, flush=True)


def divides(batch_size: int, key: str) -> None:
    """Raises UserError if the batch size is not divisible by the number of processes."""
    if batch_size % processes():
        raise UserError(
            f"{key}={batch_size}: does not divide among {processes()} processes; "
            f"set a multiple of {processes()}, or start another number of processes"
        )


def share(batch: Any) -> Any:
    """This process's part of a batch (list, array or tensor of rows): every `processes()`-th row from `rank()` on.

    If there are fewer rows than processes, each takes all of them: the average of equal gradients is the same gradient.
    """
    return batch if len(batch) < processes() else batch[rank() :: processes()]


def mean(number: torch.Tensor) -> torch.Tensor:
    """Mean of `number` over all processes. If each process divides its sum of losses by the mean count instead of its
    own, the averaged gradient is that of the whole batch, however unevenly the counted items are distributed."""
    if processes() == 1:
        return number
    total = number.float()
    dist.all_reduce(total)
    return total / processes()


def broadcast_flag(answer: bool) -> bool:
    """The first process's answer, in all of them."""
    if processes() == 1:
        return answer
    answers = [answer]
    dist.broadcast_object_list(answers)
    return answers[0]


def wait() -> None:
    """Wait until all processes have reached this point."""
    if processes() > 1:
        dist.barrier()


def leave() -> None:
    """Destroy the process group, because NCCL warns otherwise. Call it after the last exchange."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exclude_tables_from_ddp(model: torch.nn.Module) -> bool:
    """Exclude the memory tables from DDP's averaging, because NCCL cannot average sparse gradients. Returns whether any
    trained parameter is left to DDP."""
    tables = {id(m.weight) for m in model.modules() if getattr(m, "_memory_table", False)}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in tables]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return any(parameter.requires_grad for name, parameter in model.named_parameters() if name not in names)


def average_rows(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Average sparse gradients over the processes: each sends the rows that its part of the batch touched."""
    if processes() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse and not getattr(parameter, "divided", False):
            own = parameter.grad.coalesce()
            rows, values = _everyones(own.indices()[0]), _everyones(own.values()) / processes()
            parameter.grad = torch.sparse_coo_tensor(rows[None], values, own.shape, check_invariants=False).coalesce()


def _everyones(rows: torch.Tensor) -> torch.Tensor:
    """rows [n, …], where n differs between processes → those of all processes, [sum of n, …], in the order of ranks."""
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(processes())]
    dist.all_gather(counts, count)
    sizes = [int(size) for size in counts]
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: len(rows)] = rows
    everyones = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyones, padded)
    return torch.cat([part[:size] for part, size in zip(everyones, sizes, strict=True)])
