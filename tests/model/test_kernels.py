"""The GPU kernels agree with the plain code, and compile for GPUs that are not here; kernel_checks.py has what is asked
of CUDA tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memgpt.model import kernels

pytestmark = pytest.mark.skipif(not kernels.TRITON, reason="needs Triton, which is for Linux, and a C compiler")
READ, GATE = {"M": 96, "BLOCK_M": 128}, {"D": 512, "LEAD": 3, "BLOCK_D": 512, "ROWS": 2}
SHAPE = "B:i32 T:i32 position_stride:i32 scale:fp32 eps:fp32"
SUMS = "source:*bf16 order:*i64 starts:*i64 chosen:*i64 out:*fp32"
KERNELS = {
    "_gather": ("table:*fp32 addresses:*i64 out:*bf16 count:i32", {**READ, "ROWS": 32}),
    "_sum_reads": (SUMS, {**READ, "ROWS": 4, "FEW": 256, "CHOSEN": False}),
    "_sum_reads of frequent rows": (SUMS, {**READ, "ROWS": 64, "FEW": 256, "CHOSEN": True}),
    "_forward": (
        "hidden:*fp32 key:*bf16 value:*bf16 weight:*fp32 taps:*fp32 position_ids:*i64 out:*fp32 gates:*fp32 " + SHAPE,
        GATE,
    ),
    "_backward": (
        "gradient:*fp32 hidden:*fp32 key:*bf16 value:*bf16 weight:*fp32 taps:*fp32 position_ids:*i64 gates:*fp32 "
        f"hidden_grad:*fp32 key_grad:*bf16 value_grad:*bf16 sums:*fp32 {SHAPE} tiles:i32",
        {**GATE, "SUMS": 4},
    ),
    "_longest_run": (
        "tokens:*i32 earlier:*i32 position_ids:*i64 best:*i32 T:i32 columns:i32 position_stride:i32 window:i32",
        {"LONGEST": 4, "PLACES": 32, "BACK": 128},
    ),
}


def test_the_kernels_compute_what_the_plain_code_says() -> None:
    """In a process of its own: Triton is told to interpret its kernels before it is imported, which torch does."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    checks = Path(__file__).with_name("kernel_checks.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, env={**os.environ, **interpret}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_as_they_are_launched_in_training(
    name: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter forgives what the compiler does not; neither needs a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from memgpt.model.kernels import memory, recall

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments, constants = KERNELS[name]
    signature = dict(argument.split(":") for argument in arguments.split()) | dict.fromkeys(constants, "constexpr")
    kernel = getattr(recall if name == "_longest_run" else memory, name.split()[0])
    source = ASTSource(kernel, signature, constants)
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
