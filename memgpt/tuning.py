"""Which weights fine-tuning trains: all, a part, or small additions that are merged into the others at the end."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from memgpt.config import Finetune
from memgpt.errors import UserError
from memgpt.model.model import Block, FeedForward, Prefix


def prepare(model: PreTrainedModel, params: Finetune, steps: int) -> PreTrainedModel:
    """Make trainable only what `params.tune` names, and the head. Returns the model to train: itself, or wrapped.

    Raises:
        UserError: if `params.tune` names a memory and the model has none.
    """
    trunk = model.base_model
    tables = {f"{name}.weight" for name, module in trunk.named_modules() if getattr(module, "_memory_table", False)}
    if params.tune == "memory" and not tables:
        raise UserError("tune=memory: the model has no memory; choose another value")
    if params.tune in ("lora", "adalora"):
        return _low_rank(model, params, steps)
    if params.tune == "adapter":
        for block in _blocks(model):
            block.mlp = Widened(block.mlp, params.rank)  # type: ignore[assignment]
    if params.tune == "prefix":
        model.config.prefix_length = params.rank
        trunk.prefix = Prefix(model.config)
        model._init_weights(trunk.prefix)
    for name, parameter in trunk.named_parameters():
        trained = {
            "all": True,
            "backbone": "memory" not in name,
            "memory": name in tables,
            "adapter": ".adapter." in name,
            "prefix": name == "prefix.weight",
            "head": False,
        }[params.tune]
        parameter.requires_grad_(trained)
    return model


def whole(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is saved: itself, or a copy with the additions merged into its matrices."""
    if hasattr(model, "merge_and_unload"):
        return copy.deepcopy(model).merge_and_unload()
    if not any(isinstance(module, Widened) for module in model.modules()):
        return model
    merged = copy.deepcopy(model)
    for block in _blocks(merged):
        if isinstance(block.mlp, Widened):
            block.mlp = block.mlp.merged()
    merged.config.intermediate_size = merged.base_model.layers[0].mlp.up_proj.out_features
    return merged


def _blocks(model: PreTrainedModel) -> list[Block]:
    """The blocks of trunk and head. A head's block is included because the configuration has one width for all."""
    return [module for module in model.modules() if isinstance(module, Block)]


class Widened(torch.nn.Module):
    """A feed-forward layer with a bottleneck adapter in parallel (arXiv 2110.04366). The adapter has the same structure
    as the layer, so merging it only makes the layer wider. At first it adds nothing."""

    def __init__(self, layer: FeedForward, size: int):
        super().__init__()
        self.layer = layer
        self.adapter = copy.deepcopy(layer)
        for name, linear in self.adapter.named_children():
            if isinstance(linear, torch.nn.Linear):
                inputs, outputs = linear.in_features, linear.out_features
                shape = (size, outputs) if name == "down_proj" else (inputs, size)
                fresh = torch.nn.Linear(*shape, bias=linear.bias is not None)
                torch.nn.init.normal_(fresh.weight, std=0.0 if name == "down_proj" else 0.02)
                if fresh.bias is not None:
                    torch.nn.init.zeros_(fresh.bias)
                setattr(self.adapter, name, fresh)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden) + self.adapter(hidden)

    @torch.no_grad()
    def merged(self) -> FeedForward:
        """One layer, wider by the adapter's size, that computes the same."""
        layer = self.layer
        for name, own in layer.named_children():
            if isinstance(own, torch.nn.Linear):
                added, across = getattr(self.adapter, name), int(name == "down_proj")
                own.weight = torch.nn.Parameter(torch.cat((own.weight, added.weight), dim=across))
                if own.bias is not None:
                    bias = own.bias + added.bias if across else torch.cat((own.bias, added.bias))
                    own.bias = torch.nn.Parameter(bias)
                own.out_features, own.in_features = own.weight.shape
        return layer


def allocate_ranks(model: PreTrainedModel, step: int) -> None:
    """AdaLoRA's part of an optimizer step: reallocates the budget of ranks by importance. No effect on other models."""
    update = getattr(model.base_model, "update_and_allocate", None)
    if update is not None:
        update(step)


RANKS = "ranks.safetensors"
_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # AdaLoRA's importance scores


def write_ranks(model: PreTrainedModel, directory: Path) -> None:
    """Write the state with which AdaLoRA resumes into a checkpoint, because peft's own files hold truncated matrices
    and no scores. No effect on other models."""
    allocator = getattr(model.base_model, "rankallocator", None)
    if allocator is None:
        return
    tensors = {f"weight {name}": weight for name, weight in model.named_parameters() if weight.requires_grad}
    for kind in _SCORES:
        tensors |= {f"{kind} {name}": score for name, score in getattr(allocator, kind).items()}
    pattern = json.dumps(allocator.peft_config.rank_pattern)
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
        directory / RANKS,
        {"pattern": pattern},
    )


def read_ranks(model: PreTrainedModel, directory: Path) -> bool:
    """Resume from what `write_ranks` wrote, if it did. Returns whether it did."""
    if not (directory / RANKS).exists():
        return False
    allocator, weights = model.base_model.rankallocator, dict(model.named_parameters())
    with safe_open(directory / RANKS, "pt") as file, torch.no_grad():
        allocator.peft_config.rank_pattern = json.loads(file.metadata()["pattern"])
        for key in file.keys():  # noqa: SIM118  # the file is not a mapping
            kind, _, name = key.partition(" ")
            if kind == "weight":
                weights[name].copy_(file.get_tensor(key))
            else:
                getattr(allocator, kind)[name] = file.get_tensor(key).to(model.device)
    return True


def _low_rank(model: PreTrainedModel, params: Finetune, steps: int) -> PreTrainedModel:
    """LoRA (arXiv 2106.09685) or AdaLoRA (arXiv 2303.10512) on the matrices of attention and feed-forward layers."""
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    matrices = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}" and ".memory." not in name
    ]
    whole = [
        name
        for name, module in model.named_children()
        if module is not model.base_model and any(parameter.requires_grad for parameter in module.parameters())
    ]
    shared: dict[str, Any] = {"target_modules": matrices, "modules_to_save": whole, "lora_alpha": 2 * params.rank}
    if params.tune == "lora":
        return get_peft_model(model, LoraConfig(r=params.rank, **shared))
    budget = AdaLoraConfig(
        init_r=params.rank * 3 // 2,
        target_r=params.rank,
        tinit=steps // 10,
        tfinal=steps // 3,
        deltaT=max(1, steps // 100),
        total_step=steps,
        **shared,
    )
    return get_peft_model(model, budget)
