"""Triton kernels for what costs bytes, not multiplications. Each computes what plain PyTorch elsewhere says, which is
its reference and what runs without a GPU or without the extra `gpu`. Nothing here imports Triton before it is used.
"""

import os
import shutil
from importlib.util import find_spec

import torch

# Triton compiles a stub in C for each kernel. Set to False to run the plain code.
TRITON = find_spec("triton") is not None and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
LIGER = TRITON and find_spec("liger_kernel") is not None


def serve(tensor: torch.Tensor, fuses: bool = True) -> bool:
    """Whether the kernels take this tensor. In compiled code they do where a gradient is to come, of which Inductor
    makes more passes; answers are few tokens, whose plain code it fuses with what is around it, unless `fuses` says
    that it makes nothing good of it."""
    return tensor.is_cuda and TRITON and (not fuses or torch.is_grad_enabled() or not torch.compiler.is_compiling())


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the processor has instructions for bfloat16; without, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
