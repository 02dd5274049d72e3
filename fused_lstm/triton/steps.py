"""The recurrence in plain PyTorch, step by step, saving and using what the kernels save.

For what they do not serve: float64, projections, devices without cooperative launches.
"""

import torch
from torch import Tensor

_ACCUMULATE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def _turns(sizes: list[int], reverse: bool) -> list[tuple[int, int]]:
    """The first row and the number of rows of each step, in the order of the recurrence."""
    turns, row = [], 0
    for size in sizes:
        turns.append((row, size))
        row += size
    return turns[::-1] if reverse else turns


def forward_steps(
    sizes: list[int],
    reverse: bool,
    gates: Tensor,
    cells: Tensor | None,
    output: Tensor,
    h_0: Tensor,
    c_0: Tensor,
    weights: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """One direction. `gates` (N, 4H) holds x W_ih^T and gets the activated gates if `cells` is to
    be filled; `weights` are w_hh, b_ih, b_hh, w_hr. Returns h_n (B, P) and c_n (B, H)."""
    dtype = gates.dtype
    wide = _ACCUMULATE.get(dtype, dtype)
    w_hh, b_ih, b_hh, w_hr = weights
    w_t = w_hh.to(wide).t()
    bias = None if b_ih is None or b_hh is None else b_ih.to(wide) + b_hh.to(wide)
    projection = None if w_hr is None else w_hr.to(wide).t()
    h, c = h_0.to(wide, copy=True), c_0.to(wide, copy=True)
    for row, size in _turns(sizes, reverse):
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
    sizes: list[int],
    reverse: bool,
    dgates: Tensor,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    c_0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One direction. Fills `dgates` (N, 4H); returns grad_c_0 (B, H) and, with a projection, its
    weight's gradient."""
    dtype = gates.dtype
    wide = _ACCUMULATE.get(dtype, dtype)
    w, projection = w_hh.to(wide), None if w_hr is None else w_hr.to(wide)
    dh = c_0.new_zeros(c_0.shape[0], w.shape[1], dtype=wide)
    dc = c_0.new_zeros(c_0.shape, dtype=wide)
    if grad_h_n is not None:
        dh += grad_h_n
    if grad_c_n is not None:
        dc += grad_c_n
    grad_w_hr = None if projection is None else torch.zeros_like(projection)
    turns = _turns(sizes, reverse)
    for turn in reversed(range(len(turns))):
        row, size = turns[turn]
        c_before = c_0.to(wide, copy=True)[:size]
        if turn > 0:
            row_before, size_before = turns[turn - 1]
            size_before = min(size, size_before)
            c_before[:size_before] = cells[row_before : row_before + size_before]
        i, f, g, o = gates[row : row + size].to(wide).chunk(4, 1)
        tanh_c = cells[row : row + size].to(wide).tanh()
        dh_t, dc_t = dh[:size], dc[:size]
        if grad_output is not None:
            dh_t = dh_t + grad_output[row : row + size]
        if projection is not None and grad_w_hr is not None:
            grad_w_hr += dh_t.t() @ (o * tanh_c)
            dh_t = dh_t @ projection
        dc_t = dc_t + dh_t * o * (1 - tanh_c * tanh_c)
        d = (dc_t * g * i * (1 - i), dc_t * c_before * f * (1 - f), dc_t * i * (1 - g * g),
             dh_t * tanh_c * o * (1 - o))  # fmt: skip
        dgates[row : row + size] = torch.cat(d, 1)
        dh[:size], dc[:size] = dgates[row : row + size].to(wide) @ w, dc_t * f
    return dc.to(dtype), None if grad_w_hr is None else grad_w_hr.to(dtype)
