"""What a fine-tuning changes: all weights, a part of them, or low-rank additions (peft) that are merged at the end."""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

from memgpt.config import Finetune
from memgpt.errors import UserError


def prepare(model: PreTrainedModel, params: Finetune, steps: int) -> PreTrainedModel:
    """Leave trainable what `params.tune` names; the head always is. Returns the model to train: itself, or wrapped.

    Raises:
        UserError: if what is to be trained is not there.
    """
    trunk = model.base_model
    tables = {f"{name}.weight" for name, module in trunk.named_modules() if getattr(module, "_memory_table", False)}
    if params.tune == "memory" and not tables:
        raise UserError("tune=memory: the model has no memory; choose another value")
    if params.tune in ("lora", "adalora"):
        return _low_rank(model, params, steps)
    for name, parameter in trunk.named_parameters():
        trained = {
            "all": True,
            "backbone": ".memory." not in name,
            "memory": name in tables,
            "head": False,
        }[params.tune]
        parameter.requires_grad_(trained)
    return model


def whole(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is saved: itself, or a copy with the low-rank additions merged into its matrices."""
    return copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model


def allocate_ranks(model: PreTrainedModel, step: int) -> None:
    """AdaLoRA's part of an optimizer step: move the budget of ranks to where it pays. Nothing for other models."""
    update = getattr(model.base_model, "update_and_allocate", None)
    if update is not None:
        update(step)


def _low_rank(model: PreTrainedModel, params: Finetune, steps: int) -> PreTrainedModel:
    """LoRA (arXiv 2106.09685) or AdaLoRA (arXiv 2303.10512) on the matrices of attention and feed-forward layers."""
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    matrices = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}" and ".memory." not in name
    ]
    shared: dict[str, Any] = {"target_modules": matrices, "modules_to_save": ["head"], "lora_alpha": 2 * params.rank}
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
