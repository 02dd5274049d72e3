"""The recurrence on Triton's kernels, for csrc/triton.cpp: x W_ih^T is in the gates' buffer before,
the products for the gradients follow in csrc/products.cpp. Shapes and what is checked: csrc/lstm.h.

Imported when a call first needs it: importing fused_lstm imports no Triton.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import cuda
from .backward import backward_split, backward_whole
from .forward import forward_split, forward_whole
from .plan import Device, Plan, compile_options, plan
from .steps import Turn, backward_steps, forward_steps, turns

# Polls of a wait before it is broken off. A poll takes 0.4 us or more, so a minute nearly: as the
# CUDA kernels have it, for another kernel may hold the multiprocessors of the programs waited for.
PATIENCE = 1 << 27


class Weights(NamedTuple):
    """Of one direction."""

    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


class Call(NamedTuple):
    """What both passes ask of a call: B sequences, N rows, H cells, P outputs, D directions."""

    B: int
    N: int
    H: int
    P: int
    weights: list[Weights]  # of each direction
    batch_sizes: list[int] | None
    dtype: torch.dtype
    device: torch.device

    @property
    def D(self) -> int:
        return len(self.weights)

    @property
    def T(self) -> int:
        return self.N // self.B if self.batch_sizes is None else len(self.batch_sizes)

    def turns(self, d: int) -> list[Turn]:
        return turns(self.batch_sizes or [self.B] * self.T, d == 1)


def _call(
    gates: Tensor, c_0: Tensor, weights: Sequence[Tensor], batch_sizes: list[int] | None
) -> Call:
    D, N, width = gates.shape
    each = len(weights) // D
    by_direction = []
    for d in range(D):
        of = weights[d * each : (d + 1) * each]
        b_ih, b_hh = (of[1], of[2]) if each > 2 else (None, None)
        by_direction.append(Weights(of[0], b_ih, b_hh, of[-1] if each % 2 == 0 else None))
    P = weights[0].shape[1]
    return Call(
        c_0.shape[1], N, width // 4, P, by_direction, batch_sizes, gates.dtype, gates.device
    )


def recurrence_forward(
    gates: Tensor,
    cells: Tensor | None,
    output: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: list[int] | None,
) -> None:
    """Fills output (N, D*P), h_n, c_n and, where cells (D, N, H) are given, these and gates."""
    call = _call(gates, c_0, weights, batch_sizes)
    chosen = _plan(False, call)
    if chosen.kind == "steps":
        for d, of in enumerate(call.weights):
            columns = output[:, d * call.P : (d + 1) * call.P]
            saved = None if cells is None else cells[d]
            state = (h_0[d], c_0[d])
            h_n[d], c_n[d] = forward_steps(call.turns(d), gates[d], saved, columns, state, of)
        return
    by_direction = call.weights
    biases = None
    if by_direction[0].b_ih is not None:
        biases = tuple(tuple(_aligned(of[k]) for of in by_direction) for k in (1, 2))
    arguments = (
        gates,
        cells,
        output,
        (h_n, c_n),
        (_aligned(h_0), _aligned(c_0)),
        tuple(_aligned(of.w_hh) for of in by_direction),
        biases,
    )
    _launch((forward_whole, forward_split), arguments, chosen, call)


def recurrence_backward(
    dgates: Tensor,
    grad_c_0: Tensor,
    hidden: Tensor | None,
    grad_projected: Tensor | None,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: list[int] | None,
) -> None:
    """Fills dgates (D, N, 4H), grad_c_0 and, with a projection, hidden (D, N, H) and grad_projected
    (D, N, P)."""
    call = _call(gates, c_0, weights, batch_sizes)
    chosen = _plan(True, call)
    given = (grad_output, grad_h_n, grad_c_n)
    if chosen.kind == "steps":
        for d, of in enumerate(call.weights):
            dy = None if grad_output is None else grad_output[:, d * call.P : (d + 1) * call.P]
            cotangents = (dy, *(None if grad is None else grad[d] for grad in given[1:]))
            projected = None
            if hidden is not None and grad_projected is not None:
                projected = (hidden[d], grad_projected[d])
            saved = (gates[d], cells[d], c_0[d])
            grad_c_0[d] = backward_steps(call.turns(d), dgates[d], cotangents, saved, of, projected)
        return
    arguments = (
        dgates,
        grad_c_0,
        tuple(map(_aligned, given)),
        gates,
        cells,
        _aligned(c_0),
        tuple(_aligned(of.w_hh) for of in call.weights),
    )
    _launch((backward_whole, backward_split), arguments, chosen, call)


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """As the kernels take it: contiguous, at a multiple of 16 bytes. Without this promise Triton
    would read element by element, or compile again for each combination of alignments."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


# --- launches -------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _device(device: torch.device) -> Device:
    if device.type == "cuda":
        of = torch.cuda.get_device_properties(device)
        # ROCm's torch has no such property; its local data share is what a program may have.
        memory = getattr(of, "shared_memory_per_block_optin", of.shared_memory_per_block)
        return Device(of.multi_processor_count, memory, cooperative=True)
    if device.type == "xpu":
        subslices = torch.xpu.get_device_properties(device).gpu_subslice_count
        return Device(subslices, 128 << 10, cooperative=False)
    return Device(4, 128 << 10, cooperative=True)  # the interpreter, in tests


@lru_cache(maxsize=64)
def _status(device: torch.device) -> tuple[Tensor, memoryview]:
    """A number that the kernels set when a wait was broken off, and the host's view of it. It lies
    in the host's memory, so that the next call can look without waiting for the device."""
    status = torch.zeros(4, dtype=torch.int32, pin_memory=device.type == "cuda")
    return status, status.numpy().data


def _plan(backward: bool, call: Call) -> Plan:
    return plan_on(call.device, backward, (call.H, call.B, call.D, call.P), call.dtype)


def plan_on(
    device: torch.device, backward: bool, sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> Plan:
    """The plan of a layer of H cells, B sequences, D directions and P outputs on this device."""
    H, B, D, P = sizes
    return plan(backward, H, B, D, P != H, dtype, _precision(dtype) == "tf32", _device(device))


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype is torch.float32 and cuda.tf32() else "ieee"


def _packing(sizes: list[int], block_b: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the kernels are told of a packed batch, int32: the first row and the number of rows of
    each step (T, 2), and of each tile of the batch its number of steps."""
    numbers: list[int] = []
    for row, size in turns(sizes, False):
        numbers += (row, size)
    numbers += [0] * (-len(numbers) % 4)  # lengths are aligned, too
    T, at = len(sizes), len(numbers)
    lengths, t = [], T
    for first in range(0, sizes[0], block_b):
        while sizes[t - 1] <= first:
            t -= 1
        lengths.append(t)
    on_device = torch.tensor(numbers + lengths, dtype=torch.int32).to(device, non_blocking=True)
    return on_device, on_device[at:]


def _launch(
    kernels: tuple[Any, Any],
    arguments: tuple[Any, ...],
    chosen: Plan,
    call: Call,
) -> None:
    """The first kernel or the second, as the plan has it, on the call's device."""
    device = call.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current one
            return _launch(kernels, arguments, chosen, call)
    tiles = -(-call.B // chosen.block_b)
    sizes = call.batch_sizes
    packing = None if sizes is None else _packing(sizes, chosen.block_b, device)
    compiled_for = {
        "H": call.H,
        "BLOCK_B": chosen.block_b,
        "BLOCK_H": chosen.block_h,
        "PRECISION": _precision(call.dtype),
        **compile_options(chosen, device.type == "cuda" and not torch.version.hip),
    }
    counts = (call.T, call.B, call.N)
    if chosen.kind == "whole":
        kernels[0][(tiles, call.D)](*arguments, packing, *counts, **compiled_for)
        return
    status, seen = _status(device)
    if seen[0]:
        seen[0] = 0
        raise RuntimeError(
            f"an earlier LSTM kernel on {device} gave up waiting for its other programs; what it "
            f"returned is NaN. The device may be shared with a debugger or another process that "
            f"stops programs; backend('reference') does without such waits"
        )
    items = call.D * tiles
    groups = min(items, chosen.groups)
    counters = torch.zeros(items * 32, dtype=torch.int32, device=device)
    slices = -(-call.H // chosen.block_h)
    kernels[1][(groups * slices,)](
        *arguments,
        packing,
        counters,
        status,
        *counts,
        groups,
        tiles,
        PATIENCE,
        SPLIT=chosen.split,
        BLOCK_K=chosen.block_k,
        AHEAD=chosen.ahead,
        RESIDENT=chosen.kind == "split",
        launch_cooperative_grid=True,
        **compiled_for,
    )
