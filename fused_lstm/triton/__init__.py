"""The LSTM on any GPU that Triton reaches. Importing this package does not import Triton.

What Triton and GPU there are, and the recurrence that csrc/triton.cpp calls: `layer` has its code,
and is loaded when it is first called.
"""

from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor

from ..constant import constant

OLDEST = (3, 6)
CAPABILITY = (8, 0)  # of an NVIDIA GPU, the least that Triton supports
_DEVICES = ("cuda", "xpu")  # AMD's GPUs are torch's "cuda", too
_DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu",
                  "pytorch-triton-xpu")  # fmt: skip


@constant
def installed() -> tuple[bool, str]:
    """Whether there is a Triton that the kernels can be compiled with, and which or why not."""
    if util.find_spec("triton") is None:
        return False, "Triton isn't installed: pip install triton"
    version = "unknown"
    for name in _DISTRIBUTIONS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        break
    try:
        release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    except ValueError:
        release = OLDEST  # built from source, say
    if release < OLDEST:
        return False, f"Triton {version} is older than {OLDEST[0]}.{OLDEST[1]}"
    return True, f"Triton {version}"


def available() -> tuple[bool, str]:
    """Whether there is a GPU that the kernels run on, and what they serve or why there is none."""
    usable, version = installed()
    if not usable:
        return False, version
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        reason = device_refusal("cuda", index)
        if reason is not None:
            return False, reason
        name = torch.cuda.get_device_name(index)
    elif torch.xpu.is_available():
        name = torch.xpu.get_device_name()
    else:
        return False, f"{version}: no GPU visible"
    return True, (
        f"{version}; {name}: kernels in float32, bfloat16 and float16; float64 and proj_size step "
        "by step in torch's operators"
    )


def refusal(input: Tensor) -> str | None:
    """Why the kernels can't serve a call for where its tensor is; None where they can."""
    usable, reason = installed()
    if not usable:
        return reason
    if input.device.type in _DEVICES:
        return device_refusal(input.device.type, input.device.index)
    if input.is_meta:  # needs only the shapes, which the operators know
        return None
    return absence() or f"it serves tensors on GPUs, and this one is on {input.device}"


@constant
def absence() -> str | None:
    """Why there is no GPU that the kernels run on; None where there is one."""
    usable, reason = available()
    return None if usable else reason


@constant
def device_refusal(kind: str, index: int | None) -> str | None:
    """Why the kernels can't run on a GPU, None where they can. A GPU that isn't there is one of a
    FakeTensor's, for which nothing runs."""
    if kind != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_capability(index)
    if found >= CAPABILITY:
        return None
    return (
        f"Triton supports NVIDIA GPUs of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or "
        f"newer, and {torch.cuda.get_device_name(index)} has {found[0]}.{found[1]}"
    )


# --- the recurrence ------------------------------------------------------------------------------


def recurrence_forward(*arguments: Any) -> None:
    from . import layer

    layer.recurrence_forward(*arguments)


def recurrence_backward(*arguments: Any) -> None:
    from . import layer

    layer.recurrence_backward(*arguments)
