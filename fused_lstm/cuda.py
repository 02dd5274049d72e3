"""What the CUDA kernels were built for, and which GPUs and sizes they serve."""

from functools import lru_cache

import torch
from torch import Tensor

from . import _C
from .constant import constant

_BUILT = _C.build_info()["cuda"]
BUILT = _BUILT.startswith("yes: ")
FACTS = _BUILT.partition(": ")[2]  # the toolkit and architectures, or why nothing was built

# For which the largest persistent size is told.
_BATCH, _STEPS, _LARGEST = 16, 1024, 8192
_OPERANDS = {"16 bits": "bfloat16", "tf32": "tf32", "float32": "float32"}


def available() -> tuple[bool, str]:
    """Whether there is a GPU that the kernels run on, and what they serve or why there is none."""
    if not BUILT:
        return False, FACTS
    built = f"built for {FACTS}"
    if not torch.cuda.is_available():
        return False, f"{built}, no GPU visible"
    index = torch.cuda.current_device()
    reason = device_refusal(index)
    if reason is not None:
        return False, reason
    return True, f"{built}; {torch.cuda.get_device_name(index)}: {_sizes(index)}"


def tf32() -> bool:
    """Whether torch's own flag for products lets float32 be multiplied as tf32."""
    return not torch.version.hip and torch.backends.cuda.matmul.fp32_precision == "tf32"


def refusal(input: Tensor) -> str | None:
    """Why the kernels can't serve a call for where its tensor is; None where they can."""
    if not BUILT:
        return FACTS
    if input.is_cuda:
        return device_refusal(input.device.index)
    if input.is_meta:  # needs only the shapes, which the operators know
        return None
    return absence() or f"it serves tensors on NVIDIA GPUs, and this one is on {input.device}"


@constant
def absence() -> str | None:
    """Why there is no GPU that the kernels run on; None where there is one."""
    usable, reason = available()
    return None if usable else reason


@constant
def device_refusal(index: int | None) -> str | None:
    """Why the kernels can't run on a GPU, None where they can. A GPU that isn't there is one of a
    FakeTensor's, for which nothing runs."""
    if not torch.cuda.is_available():
        return None
    with torch.cuda.device(index):
        if _C.cuda_usable():
            return None
    major, minor = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    return f"built for {FACTS}, which does not run on {name} (sm_{major}{minor})"


@lru_cache
def _sizes(index: int) -> str:
    """Up to which size all steps of a sequence run in one launch."""
    with torch.cuda.device(index):
        found = [
            f"{kind} {_largest('forward', operands)} and {_largest('backward', operands)}"
            for kind, operands in _OPERANDS.items()
        ]
    return (
        f"all steps in one launch up to H (forward and backward, B {_BATCH}) "
        f"{', '.join(found)}; beyond, and in float64 and with proj_size, step by step"
    )


def _largest(pass_: str, operands: str) -> int:
    for H in range(_LARGEST, 0, -16):
        if _C.cuda_plan(pass_, operands, _STEPS, _BATCH, H).startswith("persistent"):
            return H
    return 0
