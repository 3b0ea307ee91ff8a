"""Models whose memory says something: it starts at zero, with an open gate."""

import torch
from torch.nn import init
from transformers import PreTrainedModel


@torch.no_grad()
def give_memory(model: PreTrainedModel) -> None:
    """Random rows, taps, gates and values of what is recalled, in place."""
    backbone = model.base_model
    if backbone.recall is not None:
        init.normal_(backbone.recall.value.weight, std=0.2)
        init.uniform_(backbone.recall.query_norm.weight, 0.5, 1.5)
    if backbone.memory_table is None:
        return
    init.normal_(backbone.memory_table.weight[1:])
    for layer in backbone.layers:
        if layer.memory is not None:
            init.uniform_(layer.memory.query_norm.weight, 0.5, 1.5)
            if layer.memory.lead:
                init.normal_(layer.memory.taps)
