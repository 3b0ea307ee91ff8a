"""Triton kernels for operations bound by memory traffic. Each has an equivalent in plain PyTorch elsewhere, which is
its reference, and runs without a GPU or without the extra `gpu`. Triton is imported only when a kernel is used.
"""

import os
import shutil
from importlib.util import find_spec

import torch

# Triton compiles a C stub for each kernel, so it needs a compiler. Set to False to run the plain code.
TRITON = find_spec("triton") is not None and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
LIGER = TRITON and find_spec("liger_kernel") is not None


def serve(tensor: torch.Tensor, fuses: bool = True) -> bool:
    """Whether to use the kernels for this tensor. In compiled code they run if gradients are enabled, because
    Inductor's backward pass takes more passes over memory. Inference has few tokens, for which Inductor fuses the plain
    code with its surroundings. fuses: False if it does not fuse this code well, so that the kernels run then too."""
    return tensor.is_cuda and TRITON and (not fuses or torch.is_grad_enabled() or not torch.compiler.is_compiling())


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the processor has instructions for bfloat16; without them bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
