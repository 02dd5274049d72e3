"""The three operators on Triton's kernels: what csrc/lstm.h says of a backend, on torch tensors.

The x-products go into the gates' buffer before the launch, the products with dgates follow the
backward's. Imported when a call first needs it: importing fused_lstm imports no Triton.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import products
from .backward import backward_split, backward_whole
from .forward import forward_split, forward_whole
from .plan import Device, Plan, compile_options, plan
from .steps import backward_steps, forward_steps

# Polls of a wait before it is broken off. A poll takes 0.4 us or more, so a minute nearly: as the
# CUDA kernels have it, for another kernel may hold the multiprocessors of the programs waited for.
PATIENCE = 1 << 27


class _Weights(NamedTuple):
    """Of one direction."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


def lstm_inference(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """fused_lstm::lstm_inference; shapes as csrc/ops.cpp has them."""
    return _forward(input, batch_sizes, h_0, c_0, weights, save=False)[:3]


def lstm_forward(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """fused_lstm::lstm_forward; the last two are gates (D, N, 4H) and cells (D, N, H)."""
    return _forward(input, batch_sizes, h_0, c_0, weights, save=True)


def _forward(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    D, B, P = h_0.shape
    H = c_0.shape[2]
    by_direction = _directions(weights, D)
    T, N, sizes = _lengths(input, batch_sizes, B)
    output = input.new_empty((*input.shape[:-1], D * P))
    gates = input.new_empty((D, N, 4 * H))
    cells = input.new_empty((D, N, H) if save else (0,))
    if B == 0:
        return output, torch.empty_like(h_0), torch.empty_like(c_0), gates, cells
    x = input.reshape(N, -1)
    for d, of in enumerate(by_direction):
        torch.mm(x, of.w_ih.t(), out=gates[d])

    chosen = _plan(False, H, B, D, by_direction[0], input)
    if chosen.kind == "steps":
        h_n, c_n = torch.empty_like(h_0), torch.empty_like(c_0)
        rows = output.view(N, D * P)
        for d, of in enumerate(by_direction):
            h_n[d], c_n[d] = forward_steps(
                sizes or [B] * T,
                d == 1,
                gates[d],
                cells[d] if save else None,
                rows[:, d * P : (d + 1) * P],
                h_0[d],
                c_0[d],
                of[1:],
            )
        return output, h_n, c_n, gates, cells

    h_n, c_n = input.new_empty((D, B, P)), input.new_empty((D, B, H))
    first, last = by_direction[0], by_direction[-1]
    w_first = _aligned(first.w_hh)
    has_bias = first.b_ih is not None
    arguments = (
        gates,
        cells if save else gates,
        output,
        h_n,
        c_n,
        _aligned(h_0),
        _aligned(c_0),
        w_first,
        _aligned(last.w_hh),
        *(
            (_aligned(of) for of in (first.b_ih, last.b_ih, first.b_hh, last.b_hh))
            if has_bias
            else (w_first,) * 4
        ),
    )
    constants = {"BIAS": has_bias, "SAVE": save}
    kernels = (forward_whole, forward_split)
    _launch(kernels, arguments, constants, chosen, T, B, N, H, D, sizes, input)
    return output, h_n, c_n, gates, cells


def lstm_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """fused_lstm::lstm_backward; a gradient that isn't needed is of shape (0,)."""
    D, B, P = h_0.shape
    H = c_0.shape[2]
    by_direction = _directions(weights, D)
    each = len(weights) // D
    T, N, sizes = _lengths(input, batch_sizes, B)
    found = [
        torch.zeros_like(of, memory_format=torch.contiguous_format) if B == 0 and need else None
        for of, need in zip((input, h_0, c_0, *weights), needs, strict=True)
    ]
    if B > 0:
        dgates = torch.empty_like(gates)
        grad_rows = None if grad_output is None else grad_output.reshape(N, D * P)
        chosen = _plan(True, H, B, D, by_direction[0], input)
        grad_c_0 = input.new_empty((D, B, H))
        if chosen.kind == "steps":
            for d, of in enumerate(by_direction):
                grad_c_0[d], grad_w_hr = backward_steps(
                    sizes or [B] * T,
                    d == 1,
                    dgates[d],
                    None if grad_rows is None else grad_rows[:, d * P : (d + 1) * P],
                    None if grad_h_n is None else grad_h_n[d],
                    None if grad_c_n is None else grad_c_n[d],
                    gates[d],
                    cells[d],
                    c_0[d],
                    of.w_hh,
                    of.w_hr,
                )
                if of.w_hr is not None:
                    found[3 + (d + 1) * each - 1] = grad_w_hr
        else:
            given = (grad_rows, grad_h_n, grad_c_n)
            arguments = (
                dgates,
                grad_c_0,
                *(gates if of is None else _aligned(of) for of in given),
                gates,
                cells,
                _aligned(c_0),
                _aligned(by_direction[0].w_hh),
                _aligned(by_direction[-1].w_hh),
            )
            has = zip(("HAS_OUTPUT", "HAS_H_N", "HAS_C_N"), given, strict=True)
            constants = {name: of is not None for name, of in has}
            kernels = (backward_whole, backward_split)
            _launch(kernels, arguments, constants, chosen, T, B, N, H, D, sizes, input)
        found[2] = grad_c_0
        _products(found, needs, each, dgates, input, output, h_0, by_direction, sizes)
    grads = [
        of if need and of is not None else input.new_empty((0,))
        for of, need in zip(found, needs, strict=True)
    ]
    return grads[0], grads[1], grads[2], grads[3:]


def _products(
    found: list[Tensor | None],
    needs: Sequence[bool],
    each: int,
    dgates: Tensor,
    input: Tensor,
    output: Tensor,
    h_0: Tensor,
    by_direction: Sequence[_Weights],
    sizes: list[int] | None,
) -> None:
    """Fills in the needed ones of the gradients of input, h_0, (c_0), weights."""
    D, B, P = h_0.shape
    N = dgates.shape[1]
    rows, x = output.view(N, D * P), input.reshape(N, -1)
    if needs[0]:
        grad = torch.mm(dgates[0], by_direction[0].w_ih)
        for d in range(1, D):
            grad.addmm_(dgates[d], by_direction[d].w_ih)
        found[0] = grad.view(input.shape)
    if needs[1]:
        of_h = [
            products.grad_h_0(dgates[d], of.w_hh, sizes, B, d == 1)
            for d, of in enumerate(by_direction)
        ]
        found[1] = torch.stack(of_h) if D > 1 else of_h[0].unsqueeze(0)
    for d in range(D):
        at = 3 + d * each
        if needs[at]:
            found[at] = torch.mm(dgates[d].t(), x)
        if needs[at + 1]:
            h = rows[:, d * P : (d + 1) * P]
            found[at + 1] = products.grad_w_hh(dgates[d], h, h_0[d], sizes, d == 1)
        if each > 3 and (needs[at + 2] or needs[at + 3]):
            bias = dgates[d].sum(0)
            found[at + 2] = bias
            found[at + 3] = bias.clone() if needs[at + 2] and needs[at + 3] else bias


def _directions(weights: Sequence[Tensor], D: int) -> list[_Weights]:
    each = len(weights) // D
    found = []
    for d in range(D):
        of = weights[d * each : (d + 1) * each]
        b_ih, b_hh = (of[2], of[3]) if each > 3 else (None, None)
        found.append(_Weights(of[0], of[1], b_ih, b_hh, of[-1] if each % 2 else None))
    return found


def _lengths(
    input: Tensor, batch_sizes: Tensor | None, B: int
) -> tuple[int, int, list[int] | None]:
    """T, N, and the rows of each step of a packed batch."""
    if batch_sizes is None:
        return input.shape[0], input.shape[0] * B, None
    sizes = batch_sizes.tolist()
    wrong = not sizes or sizes[-1] <= 0 or sizes[0] != B or sizes != sorted(sizes, reverse=True)
    if wrong or sum(sizes) != input.shape[0]:
        raise RuntimeError(
            f"batch_sizes must be positive, non-increasing, begin with {B} and sum to "
            f"{input.shape[0]}, got {sizes}"
        )
    return len(sizes), input.shape[0], sizes


def _aligned(tensor: Tensor) -> Tensor:
    """As the kernels take it: contiguous, at a multiple of 16 bytes. Without this promise Triton
    would read element by element, or compile again for each combination of alignments."""
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
        of = torch.xpu.get_device_properties(device)
        return Device(of.gpu_subslice_count, 128 << 10, cooperative=False)
    return Device(4, 128 << 10, cooperative=True)  # the interpreter, in tests


@lru_cache(maxsize=64)
def _status(device: torch.device) -> tuple[Tensor, Any]:
    """A number that the kernels set when a wait was broken off, and the host's view of it. It lies
    in the host's memory, so that the next call can look without waiting for the device."""
    status = torch.zeros(4, dtype=torch.int32, pin_memory=device.type == "cuda")
    return status, memoryview(status.numpy())


def _plan(backward: bool, H: int, B: int, D: int, of: _Weights, input: Tensor) -> Plan:
    projected, tf32 = of.w_hr is not None, _precision(input) == "tf32"
    return plan(backward, H, B, D, projected, input.dtype, tf32, _device(input.device))


def _precision(input: Tensor) -> str:
    if input.dtype is not torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _packing(sizes: list[int], block_b: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the kernels are told of a packed batch, int32: the first row and the number of rows of
    each step (T, 2), and of each tile of the batch its number of steps."""
    numbers: list[int] = []
    row = 0
    for size in sizes:
        numbers += (row, size)
        row += size
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
    arguments: tuple[Tensor, ...],
    constants: dict[str, bool],
    chosen: Plan,
    T: int,
    B: int,
    N: int,
    H: int,
    D: int,
    sizes: list[int] | None,
    input: Tensor,
) -> None:
    device = input.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current one
            return _launch(kernels, arguments, constants, chosen, T, B, N, H, D, sizes, input)
    tiles = -(-B // chosen.block_b)
    steps = lengths = arguments[0]  # not read when not packed
    if sizes is not None:
        steps, lengths = _packing(sizes, chosen.block_b, device)
    constants = {
        **constants,
        "H": H,
        "D": D,
        "PACKED": sizes is not None,
        "BLOCK_B": chosen.block_b,
        "BLOCK_H": chosen.block_h,
        "PRECISION": _precision(input),
        **compile_options(chosen, device.type == "cuda" and not torch.version.hip),
    }
    if chosen.kind == "whole":
        kernels[0][(tiles, D)](*arguments, steps, lengths, T, B, N, **constants)
        return
    status, seen = _status(device)
    if seen[0]:
        seen[0] = 0
        raise RuntimeError(
            f"an earlier LSTM kernel on {device} gave up waiting for its other programs; what it "
            f"returned is NaN. The device may be shared with a debugger or another process that "
            f"stops programs; backend('reference') does without such waits"
        )
    items = D * tiles
    groups = min(items, chosen.groups)
    counters = torch.zeros(items * 32, dtype=torch.int32, device=device)
    slices = -(-H // chosen.block_h)
    kernels[1][(groups * slices,)](
        *arguments,
        steps,
        lengths,
        counters,
        status,
        T,
        B,
        N,
        groups,
        tiles,
        PATIENCE,
        SPLIT=chosen.split,
        BLOCK_K=chosen.block_k,
        AHEAD=chosen.ahead,
        RESIDENT=chosen.kind == "split",
        launch_cooperative_grid=True,
        **constants,
    )
