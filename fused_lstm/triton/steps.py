"""The recurrence in plain PyTorch, step by step, saving and using what the kernels save.

For what they do not serve: float64, projections, devices without cooperative launches.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layer import Weights

_ACCUMULATE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}

Turn = tuple[int, int]  # the first row and the number of rows of a step


def turns(sizes: list[int], reverse: bool) -> list[Turn]:
    """The rows of each step, in the order of the recurrence."""
    found, row = [], 0
    for size in sizes:
        found.append((row, size))
        row += size
    return found[::-1] if reverse else found


def forward_steps(
    turns: list[Turn],
    gates: Tensor,
    cells: Tensor | None,
    output: Tensor,
    state: tuple[Tensor, Tensor],
    weights: "Weights",
) -> tuple[Tensor, Tensor]:
    """One direction, from `state`, h_0 (B, P) and c_0 (B, H). `gates` (N, 4H) hold x W_ih^T and get
    the activated gates if `cells` are to be filled. Returns h_n and c_n."""
    dtype = gates.dtype
    wide = _ACCUMULATE.get(dtype, dtype)
    w_hh, b_ih, b_hh, w_hr = weights
    w_t = w_hh.to(wide).t()
    bias = None if b_ih is None or b_hh is None else b_ih.to(wide) + b_hh.to(wide)
    projection = None if w_hr is None else w_hr.to(wide).t()
    h, c = (of.to(wide, copy=True) for of in state)
    for row, size in turns:
        sums = gates[row : row + size].to(wide) + h[:size] @ w_t
        if bias is not None:
            sums += bias
        i, f, g, o = sums.chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_t = f * c[:size] + i * g
        h_t = o * c_t.tanh()
        if projection is not None:
            h_t = h_t @ projection
        if cells is not None:
            gates[row : row + size] = torch.cat((i, f, g, o), 1)
            cells[row : row + size] = c_t
        output[row : row + size] = h_t
        h[:size], c[:size] = h_t.to(dtype), c_t
    return h.to(dtype), c.to(dtype)


def backward_steps(
    turns: list[Turn],
    dgates: Tensor,
    cotangents: tuple[Tensor | None, ...],
    saved: tuple[Tensor, Tensor, Tensor],
    weights: "Weights",
    projected: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """One direction. Fills `dgates` (N, 4H) and, with a projection, `projected`: o tanh(c) (N, H)
    and the whole gradient of h_t (N, P). `cotangents` are of output (N, P), h_n, c_n; `saved` are
    gates (N, 4H), cells (N, H), c_0 (B, H). Returns grad_c_0."""
    (grad_output, grad_h_n, grad_c_n), (gates, cells, c_0) = cotangents, saved
    dtype = gates.dtype
    wide = _ACCUMULATE.get(dtype, dtype)
    w = weights.w_hh.to(wide)
    projection = None if weights.w_hr is None else weights.w_hr.to(wide)
    dh = c_0.new_zeros(c_0.shape[0], w.shape[1], dtype=wide)
    dc = c_0.new_zeros(c_0.shape, dtype=wide)
    if grad_h_n is not None:
        dh += grad_h_n
    if grad_c_n is not None:
        dc += grad_c_n
    for turn in reversed(range(len(turns))):
        row, size = turns[turn]
        rows = slice(row, row + size)
        c_before = c_0.to(wide, copy=True)[:size]
        if turn > 0:
            row_before, size_before = turns[turn - 1]
            size_before = min(size, size_before)
            c_before[:size_before] = cells[row_before : row_before + size_before]
        i, f, g, o = gates[rows].to(wide).chunk(4, 1)
        tanh_c = cells[rows].to(wide).tanh()
        dh_t, dc_t = dh[:size], dc[:size]
        if grad_output is not None:
            dh_t = dh_t + grad_output[rows]
        if projection is not None and projected is not None:
            projected[0][rows], projected[1][rows] = o * tanh_c, dh_t
            dh_t = dh_t @ projection
        dc_t = dc_t + dh_t * o * (1 - tanh_c * tanh_c)
        d = (dc_t * g * i * (1 - i), dc_t * c_before * f * (1 - f), dc_t * i * (1 - g * g),
             dh_t * tanh_c * o * (1 - o))  # fmt: skip
        dgates[rows] = torch.cat(d, 1)
        dh[:size], dc[:size] = dgates[rows].to(wide) @ w, dc_t * f
    return dc.to(dtype)
