"""A GPU driver for Triton that loads and launches nothing: what a launch costs in Python, and what
is compiled anew, without a GPU. `python tests/triton_driver.py` prints the cost of the calls.

The cost is that of everything up to the driver's launch: the operator's function, Triton's binder,
its cache look-up and the call of the launcher; not the launcher's C code (a few microseconds). The
tensors are the CPU's and tiny, so that torch's allocations and products are in the sum, too. Of a
module's call, so are the checks, the choice of the backend, torch's dispatcher and, where gradients
are wanted, torch.library's recording of the operator, which is any backend's.
"""

from __future__ import annotations

import functools
import time
import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused_lstm.ops import OPERATORS

OURS = OPERATORS["triton"]
SMS, SHARED_MEMORY = 132, 227 << 10


class _Utils:
    def load_binary(self, *args: Any) -> tuple[int, ...]:
        return (1, 2, 64, 0, 1024)  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": SMS, "warpSize": 32}


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        Driver.launches += 1


class Driver:
    """Of an H100 that does nothing."""

    launches = 0
    utils = _Utils()
    launcher_cls = _Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def no_gpu() -> Iterator[type[Driver]]:
    """Launches go to this driver, from tensors on the CPU."""
    from fused_lstm.triton import layer
    from fused_lstm.triton.plan import Device

    of, active = layer._device, driver._active
    driver.set_active(Driver())
    layer._device = lambda device: Device(SMS, SHARED_MEMORY, True)
    try:
        yield Driver
    finally:
        layer._device = of
        driver._active = active


def calls(H: int, T: int = 1, B: int = 1) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward of one layer in bfloat16."""
    lstm = torch.nn.LSTM(2, H, dtype=torch.bfloat16)
    weights = [of.detach() for of in lstm.parameters()]
    state = torch.zeros(1, B, H, dtype=torch.bfloat16)
    call = (torch.zeros(T, B, 2, dtype=torch.bfloat16), None, state, state, weights)

    def forward() -> Any:
        return OURS.lstm_forward(*call)

    output, _, _, gates, cells = forward()

    def backward() -> Any:
        return OURS.lstm_backward(
            torch.zeros_like(output), None, None, *call, output, gates, cells, [True] * 7
        )

    return forward, backward


def _arguments_of_launch(call: Callable[[], Any]) -> tuple[Any, ...]:
    from fused_lstm.triton import layer

    with unittest.mock.patch.object(layer, "_launch", wraps=layer._launch) as launch:
        call()
    return launch.call_args.args


def _microseconds(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(3000):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 4] * 1e6


def _module_calls(H: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """FusedLSTM of one layer in bfloat16, forced to these kernels."""
    lstm = fused_lstm.FusedLSTM(2, H, dtype=torch.bfloat16)
    input = torch.zeros(1, 1, 2, dtype=torch.bfloat16)
    hx = (torch.zeros(1, 1, H, dtype=torch.bfloat16),) * 2
    with fused_lstm.backend("triton"):
        with torch.no_grad():
            yield "without gradients", lambda: lstm(input, hx)
        yield "with gradients", lambda: lstm(input, hx)


if __name__ == "__main__":
    import fused_lstm
    from fused_lstm.triton import layer

    fused_lstm.triton._DEVICES = ("cpu",)
    torch.set_num_threads(1)
    with no_gpu():
        for H, kernel in ((64, "whole"), (256, "split")):
            for name, call in zip(("forward", "backward"), calls(H), strict=True):
                arguments = _arguments_of_launch(call)
                launch = _microseconds(functools.partial(layer._launch, *arguments))
                whole = _microseconds(call)
                print(
                    f"{kernel} {name}: {whole:.0f} us a call, of which {launch:.0f} us the launch"
                )
            for name, call in _module_calls(H):
                print(f"{kernel}, FusedLSTM {name}: {_microseconds(call):.0f} us")
