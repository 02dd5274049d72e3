"""The backward kernels: from the last step to the first, all directions in one launch.

With dh_t the whole gradient of h_t, and dc_t that of c_t,
    dh_t = grad_output_t + dgates_{t+1} W_hh                          (B, H)
    dc_t = f_{t+1} dc_{t+1} + dh_t o (1 - tanh(c_t)^2)                (B, H), float32
    dgates_t = (dc g i (1 - i), dc c_{t-1} f (1 - f), dc i (1 - g^2), dh tanh(c) o (1 - o))
The gradients of input, h_0 and weights are large products of dgates, outside of the kernels.

Arguments of both kernels, contiguous and in the compute dtype:
    dgates       (D, N, 4H) out: the gradient of the gates before their activation
    grad_c_0     (D, B, H) out
    grads        of output (N, D*H), h_n and c_n (D, B, H), or None for each
    gates        (D, N, 4H) and cells (D, N, H), as the forward saved them
    c_0          (D, B, H)
    weight_hh    (4H, H) of each direction
and as forward.py has them: packing, T, B, rows, counters, status, groups, tiles.

Going backward, a row's gradients are those of h_n and c_n until its sequence's last step.
"""

import triton
import triton.language as tl

from .cell import (
    COUNTS,
    cell_gradient,
    inside,
    length_of,
    load_gates,
    matrix,
    of_direction,
    resident_product,
    resident_weight,
    rows_of_turn,
    signal,
    store_gates,
    streamed_product,
    wait,
)


@triton.jit
def _gradient(grad, at, mask):
    """In float32; zeros if it isn't given."""
    if grad is None:
        return tl.zeros(at.shape, tl.float32)
    else:
        return tl.load(grad + at, mask, 0.0).to(tl.float32)


@triton.jit
def _spread(sums, patience):
    """The same sums, taken apart and joined again in another layout (see `resident_product`).

    The caller makes NaN of all of them where a wait was broken off. Doing so with some here, too,
    keeps Triton 3.9 from folding this into nothing: 40 % more instructions at H 512.
    """
    apart = tl.reshape(sums, (sums.shape[0], sums.shape[1] // 4, 2, 2))
    even, odd = tl.split(tl.permute(apart, (0, 1, 3, 2)))
    apart = tl.join(tl.where(patience > 0, even, float("nan")), odd)
    return tl.reshape(tl.permute(apart, (0, 1, 3, 2)), sums.shape)


@triton.jit(do_not_specialize=COUNTS)
def backward_whole(
    dgates,
    grad_c_0,
    grads,
    gates,
    cells,
    c_0,
    weight_hh,
    packing,
    T,
    B,
    rows,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_hh and the gradients of the states stay in one program, of grid (tiles of the batch, D)."""
    D: tl.constexpr = len(weight_hh)
    tile = tl.program_id(0)
    d = tl.program_id(1)
    b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.arange(0, BLOCK_H)
    # (K, N) of each gate: w[k, n] = W_hh[gate * H + k, n]
    at_w = of_direction(d, weight_hh) + matrix(u, u, H)
    w = load_gates(at_w, inside(u, H, u, H), H * H)
    at_state = matrix(d * B + b, u, H)
    mask_state = inside(b, B, u, H)
    dh = _gradient(grads[1], at_state, mask_state)
    dc = _gradient(grads[2], at_state, mask_state)
    at_gates = matrix(b, u, 4 * H)
    at_cells = matrix(b, u, H)
    at_output = d * H + matrix(b, u, D * H)
    gates += d.to(tl.int64) * rows * 4 * H
    dgates += d.to(tl.int64) * rows * 4 * H
    cells += d.to(tl.int64) * rows * H

    # What a step needs is loaded one step ahead; its c_{t-1} is c_t of the step after it.
    length = length_of(packing, tile, T)
    row, count = rows_of_turn(packing, 0, length, 1 - d, B)
    row_1, count_1 = rows_of_turn(packing, 1, length, 1 - d, B)
    mask = inside(b, count, u, H)
    mask_1 = inside(b, count_1, u, H)
    activated = load_gates(gates + row * 4 * H + at_gates, mask, H)
    c = tl.load(cells + row * H + at_cells, mask, 0.0)
    at_c = tl.where(mask_1, cells + row_1 * H + at_cells, c_0 + at_state)
    c_before = tl.load(at_c, mask_state, 0.0)
    if grads[0] is not None:
        dy = tl.load(grads[0] + row * D * H + at_output, mask, 0.0)
    for s in range(length):
        row_2, count_2 = rows_of_turn(packing, s + 2, length, 1 - d, B)
        mask_2 = inside(b, count_2, u, H)
        activated_1 = load_gates(gates + row_1 * 4 * H + at_gates, mask_1, H)
        at_c = tl.where(mask_2, cells + row_2 * H + at_cells, c_0 + at_state)
        c_before_1 = tl.load(at_c, mask_state, 0.0)
        if grads[0] is not None:
            dh += dy.to(tl.float32)
            dy = tl.load(grads[0] + row_1 * D * H + at_output, mask_1, 0.0)

        d_gates, dc_before = cell_gradient(dh, dc, activated, c, c_before)
        dh_before = tl.dot(d_gates[0], w[0], input_precision=PRECISION)
        dh_before = tl.dot(d_gates[1], w[1], dh_before, input_precision=PRECISION)
        dh_before = tl.dot(d_gates[2], w[2], dh_before, input_precision=PRECISION)
        dh_before = tl.dot(d_gates[3], w[3], dh_before, input_precision=PRECISION)
        store_gates(dgates + row * 4 * H + at_gates, d_gates, mask, H)
        dh = tl.where(mask, dh_before, dh) if packing is not None else dh_before
        dc = tl.where(mask, dc_before, dc) if packing is not None else dc_before
        row, mask, activated = row_1, mask_1, activated_1
        row_1, mask_1 = row_2, mask_2
        c, c_before = c_before, c_before_1
    tl.store(grad_c_0 + at_state, dc, mask_state)


@triton.jit(do_not_specialize=COUNTS)
def backward_split(
    dgates,
    grad_c_0,
    grads,
    gates,
    cells,
    c_0,
    weight_hh,
    packing,
    counters,
    status,
    T,
    B,
    rows,
    groups,
    tiles,
    patience,
    H: tl.constexpr,
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
    D: tl.constexpr = len(weight_hh)
    SLICES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    slice = tl.program_id(0) % SLICES
    u = slice * BLOCK_H + tl.arange(0, BLOCK_H)
    if RESIDENT:
        part = tl.arange(0, SPLIT)[:, None, None] * BLOCK_K
        k_d = part + tl.arange(0, BLOCK_K)[None, None, :]
        k_w = part + tl.arange(0, BLOCK_K)[None, :, None]
        n_w = u[None, None, :]
    else:
        k_d = tl.arange(0, BLOCK_K)[None, :]
        k_w = tl.arange(0, BLOCK_K)[:, None]
        n_w = u[None, :]

    for item in range(tl.program_id(0) // SLICES, D * tiles, groups):
        d = item % D
        tile = item // D
        b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
        b_d = b[None, :, None] if RESIDENT else b[:, None]
        at_w = of_direction(d, weight_hh) + (k_w * H + n_w)
        if RESIDENT:
            w = resident_weight(at_w, n_w < H, k_w, H, 4 * H, SPLIT, BLOCK_K)
        at_state = matrix(d * B + b, u, H)
        mask_state = inside(b, B, u, H)
        dh_n = _gradient(grads[1], at_state, mask_state)
        dc = _gradient(grads[2], at_state, mask_state)
        at_gates = matrix(b, u, 4 * H)
        at_cells = matrix(b, u, H)
        at_output = d * H + matrix(b, u, D * H)
        gates_d = gates + d.to(tl.int64) * rows * 4 * H
        dgates_d = dgates + d.to(tl.int64) * rows * 4 * H
        cells_d = cells + d.to(tl.int64) * rows * H
        counter = counters + item * 32

        length = length_of(packing, tile, T)
        row, count = rows_of_turn(packing, 0, length, 1 - d, B)
        # Not `row_after = row`: Triton carries from step to step what it sees an assignment in the
        # loop change, and `row_after = row` there would assign it the value it has.
        row_after = tl.zeros((), tl.int64)
        count_after = 0
        for s in range(length):
            row_1, count_1 = rows_of_turn(packing, s + 1, length, 1 - d, B)
            mask = inside(b, count, u, H)
            mask_1 = inside(b, count_1, u, H)
            # On their way while this program waits for the others.
            activated = load_gates(gates_d + row * 4 * H + at_gates, mask, H)
            c = tl.load(cells_d + row * H + at_cells, mask, 0.0)
            at_c = tl.where(mask_1, cells_d + row_1 * H + at_cells, c_0 + at_state)
            c_before = tl.load(at_c, mask_state, 0.0)
            if grads[0] is not None:
                dy = tl.load(grads[0] + row * D * H + at_output, mask, 0.0)
            if s > 0:
                patience = wait(counter, s * SLICES, patience)

            # dgates of the step before (the one after in time), of all units
            at_d = dgates_d + row_after * 4 * H + b_d * 4 * H + k_d
            mask_d = b_d < count_after
            if RESIDENT:
                sums = resident_product(at_d, mask_d, k_d, w, 4 * H, AHEAD, PRECISION)
                sums = _spread(sums, patience)
            else:
                sums = streamed_product(at_d, mask_d, at_w, n_w < H, H, 4 * H, PRECISION)
            dh = tl.where((b < count_after)[:, None], sums, dh_n)
            if grads[0] is not None:
                dh += dy.to(tl.float32)
            dh = tl.where(patience > 0, dh, float("nan"))
            d_gates, dc_before = cell_gradient(dh, dc, activated, c, c_before)
            store_gates(dgates_d + row * 4 * H + at_gates, d_gates, mask, H)
            signal(counter)
            dc = tl.where(mask, dc_before, dc)
            row_after, count_after = row, count
            row, count = row_1, count_1
        tl.store(grad_c_0 + at_state, dc, mask_state)
    if patience == 0:
        tl.store(status, 1)
