"""What the tests on a GPU have in common: the device, the backend, and torch's flags for tf32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from parity import Options, check

from fused_lstm import backend, backends

DEVICE = "cuda"
BACKEND = "cuda"

# How the products are taken: the dtype, whether torch's flags allow tf32, and the dtype with its
# epsilon. tf32 keeps as many bits as float16 does.
PRECISIONS = {
    "float32": (torch.float32, False, torch.float32),
    "tf32": (torch.float32, True, torch.float16),
    "float64": (torch.float64, False, torch.float64),
    "bfloat16": (torch.bfloat16, False, torch.bfloat16),
    "float16": (torch.float16, False, torch.float16),
}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """In products, and in cuDNN's LSTM, which has a flag of its own."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def check_on_gpu(options: Options, precision: str, chosen: str = BACKEND) -> None:
    """parity.check, by the CUDA kernels or another backend, with cuDNN as the yardstick."""
    dtype, allowed, epsilon_of = PRECISIONS[precision]
    with tf32(allowed), backend(chosen):
        check(options, dtype, device=DEVICE, precision=epsilon_of)


@pytest.fixture
def kernels() -> Iterator[None]:
    """The CUDA kernels serve every call, or the test is skipped with the reason why not."""
    line = backends()[BACKEND]
    if not line.available:
        pytest.skip(line.detail)
    with backend(BACKEND), tf32(False):
        yield
