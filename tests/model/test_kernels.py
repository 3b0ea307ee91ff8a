"""The GPU kernels agree with the plain code; what CUDA tensors are asked is in kernel_checks.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memgpt.model import kernels


@pytest.mark.skipif(not kernels.TRITON, reason="needs Triton (Linux) and a C compiler")
def test_the_kernels_compute_what_the_plain_code_says() -> None:
    """In a process of its own: Triton is told to interpret its kernels before it is imported, which torch does."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    checks = Path(__file__).with_name("kernel_checks.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(command, env={**os.environ, **interpret}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
