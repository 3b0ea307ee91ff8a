"""Optimizers: Muon and AdamW for pretraining, a choice for fine-tuning; row-wise Adagrad for the memory table."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from memgpt import distributed
from memgpt.config import Pretrain, Training
from memgpt.model.kernels import multiplies_bfloat16
from memgpt.model.memory import row_gradient


def for_pretraining(model: PreTrainedModel, params: Pretrain) -> "Chained":
    """Muon (Jordan 2024) for the matrices of the blocks, row-wise Adagrad for memory tables, AdamW for the rest."""
    kinds = _kinds(model)
    optimizers: list[torch.optim.Optimizer] = []
    if kinds["matrices"]:
        optimizers.append(Muon(kinds["matrices"], lr=params.matrix_learning_rate, weight_decay=params.weight_decay))
    if kinds["rest"]:
        optimizers.append(
            torch.optim.AdamW(kinds["rest"], lr=params.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        )
    if kinds["tables"]:
        optimizers.append(RowAdagrad(kinds["tables"], lr=params.memory_learning_rate))
    return Chained(optimizers)


def for_tuning(model: PreTrainedModel, params: Training, optimizer: str = "adamw") -> "Chained":
    """adamw, sgd (Nesterov momentum 0.9) or adafactor; weight decay on matrices alone. Row-wise Adagrad for tables."""
    kinds = _kinds(model)
    groups = [
        {"params": kinds["matrices"], "weight_decay": params.weight_decay},
        {"params": kinds["rest"], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        choices: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.95), fused=True),
            "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
            "adafactor": torch.optim.Adafactor,
        }
        optimizers.append(choices[optimizer](groups, lr=params.learning_rate))
    if kinds["tables"]:
        optimizers.append(RowAdagrad(kinds["tables"], lr=params.memory_learning_rate))
    return Chained(optimizers)


def _kinds(model: PreTrainedModel) -> dict[str, list[torch.nn.Parameter]]:
    """The trained parameters by kind. Makes the tables' gradients sparse, so a step costs only the rows it reads."""
    kinds: dict[str, list[torch.nn.Parameter]] = {"matrices": [], "tables": [], "rest": []}
    kind_of = {}
    for module in model.modules():
        if getattr(module, "_memory_table", False):
            module.sparse = True
            kind_of[module.weight] = "tables"
        elif isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            kind_of[module.weight] = "matrices"
    for parameter in model.parameters():
        if parameter.requires_grad:
            kinds[kind_of.get(parameter, "rest")].append(parameter)
    return kinds


class Muon(torch.optim.Muon):
    """torch's Muon, but on a GPU it updates all matrices of one shape together. One after another, each too small to
    fill the GPU, they would cost a third of a step of preset `base` on an H100. On a processor without instructions for
    bf16 it multiplies in float32, because emulated bf16 takes ten times as long. State and settings are torch's, but
    Nesterov momentum and the scaling of the learning rate are always torch's defaults."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        device = self.param_groups[0]["params"][0].device
        if device.type == "cpu" and multiplies_bfloat16(device):
            super().step(closure)
            return
        for group in self.param_groups:
            alike: dict[torch.Size, list[torch.Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike.setdefault(matrix.shape, []).append(matrix)
            for matrices in alike.values():
                self.step_together(matrices, group)

    @torch.no_grad()
    def step_together(self, matrices: list[torch.Tensor], group: dict[str, Any]) -> None:
        """A step for matrices [m, n] of the same shape, with the settings of their parameter group."""
        gradients: list[torch.Tensor] = []
        momenta: list[torch.Tensor] = []
        self._init_group({"params": matrices}, [], gradients, momenta)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
        moves = orthogonal(torch.stack(ahead), group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = matrices[0].shape
        rate = group["lr"] * max(1, rows / columns) ** 0.5
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(moves.to(matrices[0].dtype).unbind()), alpha=-rate)


def orthogonal(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """matrices [k, m, n] → the same with singular values near 1, by Newton-Schulz iteration, in bf16 if the processor
    multiplies it."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.bfloat16() if multiplies_bfloat16(x.device) else x.float()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class RowAdagrad(torch.optim.Optimizer):
    """Adagrad with one accumulator per row, for tables of which a step touches few rows.

    A row's accumulator sums the mean squares of its gradients (Duchi et al. 2011, with the row as the unit), so the
    state has 1 / width of the table's size and a step costs only the rows that it touches. It counts as if the row had
    already seen `prior` gradients of the usual size (a moving average over the rows of each step). So a row that is
    updated once or twice, mostly by chance, stays small. Accepts sparse gradients, as from `nn.Embedding(sparse=True)`,
    and dense ones.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, prior: float = 4.0, eps: float = 1e-10):
        super().__init__(params, {"lr": lr, "prior": prior, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                state = self.state[table]
                if not state:
                    state["square_sum"] = torch.zeros(len(table), dtype=torch.float32, device=table.device)
                if table.grad.is_sparse:
                    gradient = row_gradient(table)
                    rows, values = gradient.indices()[0], gradient.values()
                else:
                    rows = table.grad.any(dim=1).nonzero()[:, 0]
                    values = table.grad[rows]
                divided = getattr(table, "divided", False)  # sharded: then all processes must reach the collectives
                if not len(rows) and not divided:
                    continue
                squares = values.float().square().mean(1)
                mean = squares.mean()
                if divided:
                    count = distributed.mean(squares.new_tensor(len(rows))).clamp(min=1 / distributed.processes())
                    mean = distributed.mean(squares.sum()) / count
                state["usual"] = torch.lerp(state["usual"], mean, 0.02) if "usual" in state else mean
                square_sum = state["square_sum"][rows] + squares
                state["square_sum"][rows] = square_sum
                divisor = (square_sum + group["prior"] * state["usual"]).sqrt() + group["eps"]
                change = values / divisor.to(values.dtype)[:, None]
                table.index_add_(0, rows, change, alpha=-group["lr"])


class Chained(torch.optim.Optimizer):
    """Several optimizers, each with its own parameters, that act as one."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        # Loading replaces the groups by new dictionaries, but schedules change those in this list.
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale dense gradients to a joint norm of at most `max_norm`, and sparse ones separately. Otherwise the number of
    rows that a batch touches would decide how far the matrices move. Returns the dense norm."""
    dense, sparse, divided = [], [], False
    for parameter in parameters:
        divided |= getattr(parameter, "divided", False)
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = row_gradient(parameter)  # coalesced here once, also for the optimizer
            sparse.append(parameter.grad.values())
        elif parameter.grad is not None:
            dense.append(parameter.grad)
    for gradients in (sparse, dense):
        norm = torch.nn.utils.get_total_norm(gradients)
        if gradients is sparse and divided:  # the norm over the rows of all processes
            norm = (distributed.mean(norm.square()) * distributed.processes()).sqrt()
        if gradients:
            torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
