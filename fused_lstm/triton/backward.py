"""The backward kernels: from the last step to the first, all directions in one launch.

With dh_t the whole gradient of h_t, and dc_t that of c_t,
    dh_t = grad_output_t + dgates_{t+1} W_hh                          (B, H)
    dc_t = f_{t+1} dc_{t+1} + dh_t o (1 - tanh(c_t)^2)                (B, H), float32
    dgates_t = (dc g i (1 - i), dc c_{t-1} f (1 - f), dc i (1 - g^2), dh tanh(c) o (1 - o))
The gradients of input, h_0 and weights are large products of dgates, outside of the kernels.

Arguments of both kernels, contiguous and in the compute dtype:
    dgates       (D, N, 4H) out: the gradient of the gates before their activation
    grad_c_0     (D, B, H) out
    grad_output  (N, D*H), with HAS_OUTPUT
    grad_h_n, grad_c_n    (D, B, H), with HAS_H_N and HAS_C_N
    gates        (D, N, 4H) and cells (D, N, H), as the forward saved them
    c_0          (D, B, H)
    weight_*     (4H, H) of each direction (the first twice where there is one)
and as forward.py has them: steps, lengths, T, B, rows, counters, status, groups, tiles.

Going backward, a row's gradients are those of h_n and c_n until its sequence's last step.
"""

import triton
import triton.language as tl

from .cell import signal, tanh, wait
from .forward import COUNTS, step_rows


@triton.jit
def _cell_gradient(dh, dc, i, f, g, o, c, c_before):
    """Of the gates before activation, i, f, g, o, and of c_{t-1}; all float32."""
    i = i.to(tl.float32)
    f = f.to(tl.float32)
    g = g.to(tl.float32)
    o = o.to(tl.float32)
    tanh_c = tanh(c.to(tl.float32))
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    d_i = dc * g * i * (1.0 - i)
    d_f = dc * c_before.to(tl.float32) * f * (1.0 - f)
    d_g = dc * i * (1.0 - g * g)
    d_o = dh * tanh_c * o * (1.0 - o)
    return d_i, d_f, d_g, d_o, dc * f


@triton.jit
def _load_gates(at, mask, H: tl.constexpr):
    i = tl.load(at, mask, 0.0)
    f = tl.load(at + H, mask, 0.0)
    g = tl.load(at + 2 * H, mask, 0.0)
    o = tl.load(at + 3 * H, mask, 0.0)
    return i, f, g, o


@triton.jit
def _rows_of_turn(steps, s, length, d, B, PACKED: tl.constexpr):
    """The first row and the number of rows (0 past the end) of the s-th step going backward."""
    s_inside = tl.minimum(s, length - 1)
    t = length - 1 - s_inside + d * (2 * s_inside - length + 1)
    row, count = step_rows(steps, t, B, PACKED)
    return row, tl.where(s < length, count, 0)


@triton.jit(do_not_specialize=COUNTS)
def backward_whole(
    dgates,
    grad_c_0,
    grad_output,
    grad_h_n,
    grad_c_n,
    gates,
    cells,
    c_0,
    weight_hh_0,
    weight_hh_1,
    steps,
    lengths,
    T,
    B,
    rows,
    H: tl.constexpr,
    D: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_H_N: tl.constexpr,
    HAS_C_N: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_hh and the gradients of the states stay in one program, of grid (tiles of the batch, D)."""
    dtype: tl.constexpr = dgates.dtype.element_ty
    tile = tl.program_id(0)
    d = tl.program_id(1)
    weight = weight_hh_0
    if d == 1:
        weight = weight_hh_1
    b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.arange(0, BLOCK_H)
    unit = u < H
    # (K, N) of each gate: w[k, n] = W_hh[gate * H + k, n]
    at_w = u[:, None] * H + u[None, :]
    mask_w = unit[:, None] & unit[None, :]
    w_i = tl.load(weight + at_w, mask_w, 0.0)
    w_f = tl.load(weight + H * H + at_w, mask_w, 0.0)
    w_g = tl.load(weight + 2 * H * H + at_w, mask_w, 0.0)
    w_o = tl.load(weight + 3 * H * H + at_w, mask_w, 0.0)

    at_state = (d * B + b)[:, None] * H + u[None, :]
    mask_state = (b < B)[:, None] & unit[None, :]
    dh = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    dc = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if HAS_H_N:
        dh = tl.load(grad_h_n + at_state, mask_state, 0.0).to(tl.float32)
    if HAS_C_N:
        dc = tl.load(grad_c_n + at_state, mask_state, 0.0).to(tl.float32)

    length = T
    if PACKED:
        length = tl.load(lengths + tile)
    at_gates = b[:, None] * 4 * H + u[None, :]
    at_cells = b[:, None] * H + u[None, :]
    at_output = b[:, None] * D * H + d * H + u[None, :]
    gates += d.to(tl.int64) * rows * 4 * H
    dgates += d.to(tl.int64) * rows * 4 * H
    cells += d.to(tl.int64) * rows * H

    # What a step needs is loaded one step ahead; its c_{t-1} is c_t of the step after it.
    row, count = _rows_of_turn(steps, 0, length, d, B, PACKED)
    row_1, count_1 = _rows_of_turn(steps, 1, length, d, B, PACKED)
    mask = (b < count)[:, None] & unit[None, :]
    mask_1 = (b < count_1)[:, None] & unit[None, :]
    i, f, g, o = _load_gates(gates + row * 4 * H + at_gates, mask, H)
    c = tl.load(cells + row * H + at_cells, mask, 0.0)
    at_c = tl.where(mask_1, cells + row_1 * H + at_cells, c_0 + at_state)
    c_before = tl.load(at_c, mask_state, 0.0)
    dy = tl.zeros((BLOCK_B, BLOCK_H), dtype)
    if HAS_OUTPUT:
        dy = tl.load(grad_output + row * D * H + at_output, mask, 0.0)
    for s in range(length):
        row_2, count_2 = _rows_of_turn(steps, s + 2, length, d, B, PACKED)
        mask_2 = (b < count_2)[:, None] & unit[None, :]
        i_1, f_1, g_1, o_1 = _load_gates(gates + row_1 * 4 * H + at_gates, mask_1, H)
        at_c = tl.where(mask_2, cells + row_2 * H + at_cells, c_0 + at_state)
        c_before_1 = tl.load(at_c, mask_state, 0.0)
        if HAS_OUTPUT:
            dy_1 = tl.load(grad_output + row_1 * D * H + at_output, mask_1, 0.0)

        if HAS_OUTPUT:
            dh += dy.to(tl.float32)
        d_i, d_f, d_g, d_o, dc_before = _cell_gradient(dh, dc, i, f, g, o, c, c_before)
        d_i = d_i.to(dtype)
        d_f = d_f.to(dtype)
        d_g = d_g.to(dtype)
        d_o = d_o.to(dtype)
        dh_before = tl.dot(d_i, w_i, input_precision=PRECISION)
        dh_before = tl.dot(d_f, w_f, dh_before, input_precision=PRECISION)
        dh_before = tl.dot(d_g, w_g, dh_before, input_precision=PRECISION)
        dh_before = tl.dot(d_o, w_o, dh_before, input_precision=PRECISION)
        at = dgates + row * 4 * H + at_gates
        tl.store(at, d_i, mask)
        tl.store(at + H, d_f, mask)
        tl.store(at + 2 * H, d_g, mask)
        tl.store(at + 3 * H, d_o, mask)
        if PACKED:
            dh = tl.where(mask, dh_before, dh)
            dc = tl.where(mask, dc_before, dc)
        else:
            dh = dh_before
            dc = dc_before
        row, mask = row_1, mask_1
        row_1, mask_1 = row_2, mask_2
        i, f, g, o = i_1, f_1, g_1, o_1
        c = c_before
        c_before = c_before_1
        if HAS_OUTPUT:
            dy = dy_1
    tl.store(grad_c_0 + at_state, dc.to(dtype), mask_state)


@triton.jit(do_not_specialize=COUNTS)
def backward_split(
    dgates,
    grad_c_0,
    grad_output,
    grad_h_n,
    grad_c_n,
    gates,
    cells,
    c_0,
    weight_hh_0,
    weight_hh_1,
    steps,
    lengths,
    counters,
    status,
    T,
    B,
    rows,
    groups,
    tiles,
    patience,
    H: tl.constexpr,
    D: tl.constexpr,
    HAS_OUTPUT: tl.constexpr,
    HAS_H_N: tl.constexpr,
    HAS_C_N: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Groups of ceil(H / BLOCK_H) programs, each with BLOCK_H units, as forward_split has them.

    A program's dh needs the gate gradients of all units: K = 4H, W_hh's columns of its units.
    """
    dtype: tl.constexpr = dgates.dtype.element_ty
    SLICES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    CHUNK: tl.constexpr = SPLIT * BLOCK_K
    CHUNKS: tl.constexpr = (4 * H + CHUNK - 1) // CHUNK
    EVEN: tl.constexpr = 4 * H % CHUNK == 0
    slice = tl.program_id(0) % SLICES
    u = slice * BLOCK_H + tl.arange(0, BLOCK_H)
    unit = u < H
    if RESIDENT:
        part = tl.arange(0, SPLIT)[:, None, None] * BLOCK_K
        k_d = part + tl.arange(0, BLOCK_K)[None, None, :]
        k_w = part + tl.arange(0, BLOCK_K)[None, :, None]
        n_w = u[None, None, :]
        unit_w = unit[None, None, :]
    else:
        k_d = tl.arange(0, BLOCK_K)[None, :]
        k_w = tl.arange(0, BLOCK_K)[:, None]
        n_w = u[None, :]
        unit_w = unit[None, :]

    for item in range(tl.program_id(0) // SLICES, D * tiles, groups):
        d = item % D
        tile = item // D
        weight = weight_hh_0
        if d == 1:
            weight = weight_hh_1
        if RESIDENT:
            w = ()
            at_w = weight + (k_w * H + n_w)
            for chunk in tl.static_range(CHUNKS):
                mask_w = unit_w & (EVEN | (chunk * CHUNK + k_w < 4 * H))
                w = w + (tl.load(at_w + chunk * CHUNK * H, mask_w, 0.0),)
        b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
        at_state = (d * B + b)[:, None] * H + u[None, :]
        mask_state = (b < B)[:, None] & unit[None, :]
        dh_n = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        dc = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
        if HAS_H_N:
            dh_n = tl.load(grad_h_n + at_state, mask_state, 0.0).to(tl.float32)
        if HAS_C_N:
            dc = tl.load(grad_c_n + at_state, mask_state, 0.0).to(tl.float32)
        at_gates = b[:, None] * 4 * H + u[None, :]
        at_cells = b[:, None] * H + u[None, :]
        at_output = b[:, None] * D * H + d * H + u[None, :]
        gates_d = gates + d.to(tl.int64) * rows * 4 * H
        dgates_d = dgates + d.to(tl.int64) * rows * 4 * H
        cells_d = cells + d.to(tl.int64) * rows * H
        counter = counters + item * 32

        length = T
        if PACKED:
            length = tl.load(lengths + tile)
        row, count = _rows_of_turn(steps, 0, length, d, B, PACKED)
        # Not `row_after = row`: Triton carries from step to step what it sees an assignment in the
        # loop change, and `row_after = row` there would assign it the value it has.
        row_after = tl.zeros((), tl.int64)
        count_after = 0
        for s in range(length):
            row_1, count_1 = _rows_of_turn(steps, s + 1, length, d, B, PACKED)
            mask = (b < count)[:, None] & unit[None, :]
            mask_1 = (b < count_1)[:, None] & unit[None, :]
            # On their way while this program waits for the others.
            i, f, g, o = _load_gates(gates_d + row * 4 * H + at_gates, mask, H)
            c = tl.load(cells_d + row * H + at_cells, mask, 0.0)
            at_c = tl.where(mask_1, cells_d + row_1 * H + at_cells, c_0 + at_state)
            c_before = tl.load(at_c, mask_state, 0.0)
            if HAS_OUTPUT:
                dy = tl.load(grad_output + row * D * H + at_output, mask, 0.0)
            if s > 0:
                patience = wait(counter, s * SLICES, patience)

            # dgates of the step before (the one after in time), of all units
            at_d = dgates_d + row_after * 4 * H + b * 4 * H
            mask_d = b < count_after
            if RESIDENT:
                at_d = at_d[None, :, None] + k_d
                mask_d = mask_d[None, :, None]
                sums = tl.zeros((SPLIT, BLOCK_B, BLOCK_H), tl.float32)
            else:
                at_d = at_d[:, None] + k_d
                mask_d = mask_d[:, None]
                sums = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
            if RESIDENT:
                d_k = (tl.load(at_d, mask_d & (EVEN | (k_d < 4 * H)), 0.0, cache_modifier=".cg"),)
                for chunk in tl.static_range(CHUNKS):
                    for ahead in tl.static_range(len(d_k), min(chunk + 1 + AHEAD, CHUNKS)):
                        mask_k = mask_d & (EVEN | (ahead * CHUNK + k_d < 4 * H))
                        at_k = at_d + ahead * CHUNK
                        d_k = d_k + (tl.load(at_k, mask_k, 0.0, cache_modifier=".cg"),)
                    sums = tl.dot(d_k[chunk], w[chunk], sums, input_precision=PRECISION)
            else:
                for k in range(0, 4 * H, CHUNK):
                    x = tl.load(at_d + k, mask_d & (k + k_d < 4 * H), 0.0, cache_modifier=".cg")
                    y = tl.load(weight + ((k + k_w) * H + n_w), unit_w & (k + k_w < 4 * H), 0.0)
                    sums = tl.dot(x, y, sums, input_precision=PRECISION)
            if RESIDENT:
                # In the layout of a sum of products every warp has all of it. Taking it apart by
                # columns that are other threads' makes Triton spread the rest over the warps.
                apart = tl.reshape(tl.sum(sums, 0), (BLOCK_B, BLOCK_H // 4, 2, 2))
                even, odd = tl.split(tl.permute(apart, (0, 1, 3, 2)))
                apart = tl.join(tl.where(patience > 0, even, float("nan")), odd)
                sums = tl.reshape(tl.permute(apart, (0, 1, 3, 2)), (BLOCK_B, BLOCK_H))
            dh = tl.where((b < count_after)[:, None], sums, dh_n)
            if HAS_OUTPUT:
                dh += dy.to(tl.float32)
            dh = tl.where(patience > 0, dh, float("nan"))
            d_i, d_f, d_g, d_o, dc_before = _cell_gradient(dh, dc, i, f, g, o, c, c_before)
            at = dgates_d + row * 4 * H + at_gates
            tl.store(at, d_i.to(dtype), mask)
            tl.store(at + H, d_f.to(dtype), mask)
            tl.store(at + 2 * H, d_g.to(dtype), mask)
            tl.store(at + 3 * H, d_o.to(dtype), mask)
            signal(counter)
            dc = tl.where(mask, dc_before, dc)
            row_after = row
            count_after = count
            row = row_1
            count = count_1
        tl.store(grad_c_0 + at_state, dc.to(dtype), mask_state)
    if patience == 0:
        tl.store(status, 1)
