"""The blocks' matrix products in 8 bits during training, through torchao (extra `float8`)."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

CAPABILITY = (8, 9)  # of the GPU: Ada, Hopper and later multiply 8-bit floats
_MULTIPLE = 16  # the product takes matrices whose sizes are multiples of this


def available() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= CAPABILITY


def fits(weight: torch.Tensor) -> bool:
    """Whether the product takes a matrix of this shape."""
    return all(size % _MULTIPLE == 0 for size in weight.shape)


@contextmanager
def products(model: PreTrainedModel, emulate: bool = False) -> Iterator[None]:
    """Within this context the blocks multiply in float8, forward and backward, with a scale per tensor (arXiv
    2209.05433). Weights, optimizer state and parameter names stay as they are. emulate: round likewise but multiply in
    32 bits, on any device.

    Raises:
        ImportError: if torchao is not installed.
    """
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=emulate)
    blocks: nn.Module = model.base_model.layers
    places = {name: module for name, module in blocks.named_modules() if isinstance(module, nn.Linear)}
    places = {name: linear for name, linear in places.items() if fits(linear.weight)}
    for name, linear in places.items():
        blocks.set_submodule(name, Float8Linear.from_float(linear, config))
    try:
        yield
    finally:
        for name, linear in places.items():
            blocks.set_submodule(name, linear)
