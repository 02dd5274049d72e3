"""The forward kernels: T steps of one layer's recurrence, all its directions in one launch.

    gates = x_t W_ih^T + h_{t-1} W_hh^T + b_ih + b_hh        (B, 4H), order i, f, g, o
    c_t   = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)          (B, H), float32
    h_t   = sigmoid(o) tanh(c_t)                             (B, H)

Arguments of both kernels, in the compute dtype and contiguous if nothing else is said:
    gates        (D, N, 4H) in: x_t W_ih^T; out, with cells: the activated gates
    cells        (D, N, H) out: c_t; or None
    output       (N, D*H) out: h_t
    states_n     h_n and c_n, (D, B, H) out
    states_0     h_0 and c_0, (D, B, H)
    weight_hh    (4H, H) of each direction
    biases       b_ih and b_hh, (4H) of each direction; or None
    packing      None, or int32 (T, 2), the first row and the number of rows of each step, and int32
                 (tiles), the steps of each tile of BLOCK_B sequences
    T, B, rows   steps, sequences, N
Pointers are aligned to 16 bytes: the host copies what isn't. Those that belong together are tuples,
None is compiled for where one isn't given: a launch costs less than with each by itself.

Sequences are sorted, longest first. A row takes part in step t if it is below that step's number of
rows; outside its sequence it keeps its state, which is thus h_0 until a reversed sequence begins
and h_n after any has ended.
"""

import triton
import triton.language as tl

from .cell import (
    COUNTS,
    cell,
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
def _biases(bias_ih, bias_hh, u, H: tl.constexpr):
    """b_ih + b_hh of each gate, (1, units), float32."""
    ih = load_gates(bias_ih + u, u < H, H)
    hh = load_gates(bias_hh + u, u < H, H)
    return [(ih[gate].to(tl.float32) + hh[gate].to(tl.float32))[None, :] for gate in (0, 1, 2, 3)]


@triton.jit
def _by_gate(sums):
    """The columns of sums (BLOCK_B, 4 BLOCK_H), unit after unit with the four gates of each, by the
    two bits of the gate's number."""
    sums = tl.reshape(sums, (sums.shape[0], sums.shape[1] // 4, 2, 2))
    ig, fo = tl.split(sums)
    i, g = tl.split(ig)
    f, o = tl.split(fo)
    return i, f, g, o


@triton.jit(do_not_specialize=COUNTS)
def forward_whole(
    gates,
    cells,
    output,
    states_n,
    states_0,
    weight_hh,
    biases,
    packing,
    T,
    B,
    rows,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_hh and the states stay in one program, of grid (tiles of the batch, D)."""
    D: tl.constexpr = len(weight_hh)
    tile = tl.program_id(0)
    d = tl.program_id(1)
    b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.arange(0, BLOCK_H)
    # (K, N) of each gate: w[k, n] = W_hh[gate * H + n, k]
    at_w = of_direction(d, weight_hh) + (u[None, :] * H + u[:, None])
    w = load_gates(at_w, (u < H)[None, :] & (u < H)[:, None], H * H)
    bias = None
    if biases is not None:
        bias = _biases(of_direction(d, biases[0]), of_direction(d, biases[1]), u, H)
    at_state = matrix(d * B + b, u, H)
    mask_state = inside(b, B, u, H)
    h = tl.load(states_0[0] + at_state, mask_state, 0.0)
    c = tl.load(states_0[1] + at_state, mask_state, 0.0).to(tl.float32)
    gates += d.to(tl.int64) * rows * 4 * H

    # The x-products of a step are loaded one step ahead.
    length = length_of(packing, tile, T)
    row, count = rows_of_turn(packing, 0, length, d, B)
    at = gates + row * 4 * H + matrix(b, u, 4 * H)
    mask = inside(b, count, u, H)
    x = load_gates(at, mask, H)
    for s in range(length):
        row_ahead, count_ahead = rows_of_turn(packing, s + 1, length, d, B)
        at_ahead = gates + row_ahead * 4 * H + matrix(b, u, 4 * H)
        mask_ahead = inside(b, count_ahead, u, H)
        x_ahead = load_gates(at_ahead, mask_ahead, H)

        sums = [tl.dot(h, w_k, input_precision=PRECISION) for w_k in w]
        activated, c_t, h_t = cell(sums, x, bias, c)
        h_t = h_t.to(h.dtype)
        tl.store(output + row * D * H + d * H + matrix(b, u, D * H), h_t, mask)
        if cells is not None:
            tl.store(cells + (d.to(tl.int64) * rows + row) * H + matrix(b, u, H), c_t, mask)
            store_gates(at, activated, mask, H)
        c = tl.where(mask, c_t, c) if packing is not None else c_t
        h = tl.where(mask, h_t, h) if packing is not None else h_t
        row, at, mask, x = row_ahead, at_ahead, mask_ahead, x_ahead
    tl.store(states_n[0] + at_state, h, mask_state)
    tl.store(states_n[1] + at_state, c, mask_state)


@triton.jit(do_not_specialize=COUNTS)
def forward_split(
    gates,
    cells,
    output,
    states_n,
    states_0,
    weight_hh,
    biases,
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
    """Groups of ceil(H / BLOCK_H) programs, each program with the four gates of BLOCK_H units.

    A group takes one tile of the batch in one direction after the other, and meets after each step.
    All programs must run at once: a cooperative launch of groups * ceil(H / BLOCK_H) programs.
    Further arguments:
        counters   int32 (D * tiles, 32), zeros: the signals of each group's work, a cache line each
        status     int32 (1) out: 1 if a wait was broken off after `patience` polls
        groups, tiles   of the launch; of BLOCK_B sequences
        RESIDENT   W_hh's part is kept in shared memory; otherwise it is read anew each step
        SPLIT      parts of the sum over K = H, BLOCK_K at a time each: with RESIDENT a batch of
                   products, which Triton gives a warp each; without it 1
        AHEAD      of the parts of h, how many are loaded ahead of the product
    """
    D: tl.constexpr = len(weight_hh)
    SLICES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    slice = tl.program_id(0) % SLICES
    u = slice * BLOCK_H + tl.arange(0, BLOCK_H)
    # Columns of the product: unit after unit, the four gates of each.
    n = tl.arange(0, 4 * BLOCK_H)
    n_unit = slice * BLOCK_H + n // 4
    n_w = ((n % 4) * H + n_unit)[None, :]
    mask_w = (n_unit < H)[None, :]
    k = tl.arange(0, SPLIT * BLOCK_K)

    for item in range(tl.program_id(0) // SLICES, D * tiles, groups):
        d = item % D
        tile = item // D
        b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
        at_w = of_direction(d, weight_hh) + (n_w * H + k[:, None])
        if RESIDENT:
            w = resident_weight(at_w, mask_w, k[:, None], 1, H, SPLIT, BLOCK_K)
        bias = None
        if biases is not None:
            bias = _biases(of_direction(d, biases[0]), of_direction(d, biases[1]), u, H)
        at_state = matrix(d * B + b, u, H)
        mask_state = inside(b, B, u, H)
        h = tl.load(states_0[0] + at_state, mask_state, 0.0)  # of its units, for h_n
        c = tl.load(states_0[1] + at_state, mask_state, 0.0).to(tl.float32)
        gates_d = gates + d.to(tl.int64) * rows * 4 * H
        counter = counters + item * 32

        length = length_of(packing, tile, T)
        row_before = tl.zeros((), tl.int64)
        count_before = 0
        for s in range(length):
            row, count = rows_of_turn(packing, s, length, d, B)
            at = gates_d + row * 4 * H + matrix(b, u, 4 * H)
            mask = inside(b, count, u, H)
            # On their way while this program waits for the others.
            x = load_gates(at, mask, H)
            if s > 0:
                patience = wait(counter, s * SLICES, patience)

            # h of the step before, of all units: a row that has none yet has h_0's.
            before = output + row_before * D * H + d * H + b.to(tl.int64) * D * H
            first = states_0[0] + (d * B + b).to(tl.int64) * H
            at_h = tl.where(b < count_before, before, first)
            if H % 8 == 0:
                at_h = tl.multiple_of(at_h, 16)  # which Triton 3.9 does not see, for wide loads
            at_h = at_h[:, None] + k[None, :]
            mask_h = (b < count)[:, None]
            if RESIDENT:
                sums = resident_product(at_h, mask_h, k[None, :], w, H, AHEAD, PRECISION)
            else:
                sums = streamed_product(at_h, mask_h, at_w, mask_w, 1, H, PRECISION)
            activated, c_t, h_t = cell(_by_gate(sums), x, bias, c)
            h_t = tl.where(patience > 0, h_t, float("nan")).to(h.dtype)
            tl.store(output + row * D * H + d * H + matrix(b, u, D * H), h_t, mask)
            signal(counter)
            # What only this program and later kernels read is stored after the signal.
            if cells is not None:
                tl.store(cells + (d.to(tl.int64) * rows + row) * H + matrix(b, u, H), c_t, mask)
                store_gates(at, activated, mask, H)
            c = tl.where(mask, c_t, c)
            h = tl.where(mask, h_t, h)
            row_before, count_before = row, count
        tl.store(states_n[0] + at_state, h, mask_state)
        tl.store(states_n[1] + at_state, c, mask_state)
    if patience == 0:
        tl.store(status, 1)
