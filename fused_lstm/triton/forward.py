"""The forward kernels: T steps of one layer's recurrence, all its directions in one launch.

    gates = x_t W_ih^T + h_{t-1} W_hh^T + b_ih + b_hh        (B, 4H), order i, f, g, o
    c_t   = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)          (B, H), float32
    h_t   = sigmoid(o) tanh(c_t)                             (B, H)

Arguments of both kernels, in the compute dtype and contiguous if nothing else is said:
    gates        (D, N, 4H) in: x_t W_ih^T; out, with SAVE: the activated gates
    cells        (D, N, H) out, with SAVE: c_t
    output       (N, D*H) out: h_t
    h_n, c_n     (D, B, H) out
    h_0, c_0     (D, B, H)
    weight_*     (4H, H) of each direction (the first twice where there is one)
    bias_*       (4H) of each direction: b_ih and b_hh, with BIAS
    steps        int32 (T, 2), with PACKED: the first row and the number of rows of each step
    lengths      int32 (tiles), with PACKED: the steps of each tile of BLOCK_B sequences
    T, B, rows   steps, sequences, N
Pointers are aligned to 16 bytes: the host copies what isn't.

Sequences are sorted, longest first. A row takes part in step t if it is below that step's number of
rows; outside its sequence it keeps its state, which is thus h_0 until a reversed sequence begins
and h_n after any has ended.
"""

import triton
import triton.language as tl

from .cell import sigmoid, signal, tanh, wait

# What changes from call to call must not make Triton compile anew.
COUNTS = ("T", "B", "rows", "patience", "groups", "tiles")


@triton.jit
def _bias(bias_ih, bias_hh, at, mask):
    return tl.load(bias_ih + at, mask, 0.0).to(tl.float32) + tl.load(bias_hh + at, mask, 0.0).to(
        tl.float32
    )


@triton.jit
def step_rows(steps, t, B, PACKED: tl.constexpr):
    """The first row and the number of rows of step t."""
    if PACKED:
        return tl.load(steps + 2 * t).to(tl.int64), tl.load(steps + 2 * t + 1)
    else:
        return t.to(tl.int64) * B, B


@triton.jit
def parts(x, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr):
    """The columns of x (BLOCK_B, SPLIT * BLOCK_K) in parts: (SPLIT, BLOCK_B, BLOCK_K).

    Loaded as a matrix and taken apart afterwards, because Triton 3.7 to 3.9 lay out a load of three
    dimensions for a shared memory that is swizzled across parts: 80 to 125 more registers with
    Triton 3.7, and spills.
    """
    return tl.permute(tl.reshape(x, (x.shape[0], SPLIT, BLOCK_K)), (1, 0, 2))


@triton.jit(do_not_specialize=COUNTS)
def forward_whole(
    gates,
    cells,
    output,
    h_n,
    c_n,
    h_0,
    c_0,
    weight_hh_0,
    weight_hh_1,
    bias_ih_0,
    bias_ih_1,
    bias_hh_0,
    bias_hh_1,
    steps,
    lengths,
    T,
    B,
    rows,
    H: tl.constexpr,
    D: tl.constexpr,
    BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W_hh and the states stay in one program, of grid (tiles of the batch, D)."""
    dtype: tl.constexpr = output.dtype.element_ty
    tile = tl.program_id(0)
    d = tl.program_id(1)
    weight = weight_hh_0
    bias_ih = bias_ih_0
    bias_hh = bias_hh_0
    if d == 1:
        weight = weight_hh_1
        bias_ih = bias_ih_1
        bias_hh = bias_hh_1
    b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    u = tl.arange(0, BLOCK_H)
    unit = u < H
    # (K, N) of each gate: w[k, n] = W_hh[gate * H + n, k]
    at_w = u[None, :] * H + u[:, None]
    mask_w = unit[None, :] & unit[:, None]
    w_i = tl.load(weight + at_w, mask_w, 0.0)
    w_f = tl.load(weight + H * H + at_w, mask_w, 0.0)
    w_g = tl.load(weight + 2 * H * H + at_w, mask_w, 0.0)
    w_o = tl.load(weight + 3 * H * H + at_w, mask_w, 0.0)

    at_state = (d * B + b)[:, None] * H + u[None, :]
    mask_state = (b < B)[:, None] & unit[None, :]
    h = tl.load(h_0 + at_state, mask_state, 0.0)
    c = tl.load(c_0 + at_state, mask_state, 0.0).to(tl.float32)
    if BIAS:
        b_i = _bias(bias_ih, bias_hh, u, unit)[None, :]
        b_f = _bias(bias_ih, bias_hh, H + u, unit)[None, :]
        b_g = _bias(bias_ih, bias_hh, 2 * H + u, unit)[None, :]
        b_o = _bias(bias_ih, bias_hh, 3 * H + u, unit)[None, :]

    length = T
    if PACKED:
        length = tl.load(lengths + tile)
    gates += d.to(tl.int64) * rows * 4 * H
    cells += d.to(tl.int64) * rows * H
    output += d * H

    # The x-products of a step are loaded one step ahead.
    t = d * (length - 1)
    row, count = step_rows(steps, t, B, PACKED)
    at = gates + row * 4 * H + (b[:, None] * 4 * H + u[None, :])
    mask = (b < count)[:, None] & unit[None, :]
    x_i = tl.load(at, mask, 0.0)
    x_f = tl.load(at + H, mask, 0.0)
    x_g = tl.load(at + 2 * H, mask, 0.0)
    x_o = tl.load(at + 3 * H, mask, 0.0)
    for s in range(length):
        t_ahead = tl.minimum(s + 1, length - 1)
        t_ahead = t_ahead + d * (length - 1 - 2 * t_ahead)
        row_ahead, count_ahead = step_rows(steps, t_ahead, B, PACKED)
        count_ahead = tl.where(s + 1 < length, count_ahead, 0)
        at_ahead = gates + row_ahead * 4 * H + (b[:, None] * 4 * H + u[None, :])
        mask_ahead = (b < count_ahead)[:, None] & unit[None, :]
        ahead_i = tl.load(at_ahead, mask_ahead, 0.0)
        ahead_f = tl.load(at_ahead + H, mask_ahead, 0.0)
        ahead_g = tl.load(at_ahead + 2 * H, mask_ahead, 0.0)
        ahead_o = tl.load(at_ahead + 3 * H, mask_ahead, 0.0)

        i = tl.dot(h, w_i, input_precision=PRECISION) + x_i.to(tl.float32)
        f = tl.dot(h, w_f, input_precision=PRECISION) + x_f.to(tl.float32)
        g = tl.dot(h, w_g, input_precision=PRECISION) + x_g.to(tl.float32)
        o = tl.dot(h, w_o, input_precision=PRECISION) + x_o.to(tl.float32)
        if BIAS:
            i += b_i
            f += b_f
            g += b_g
            o += b_o
        i = sigmoid(i)
        f = sigmoid(f)
        g = tanh(g)
        o = sigmoid(o)
        c_t = f * c + i * g
        h_t = (o * tanh(c_t)).to(dtype)
        tl.store(output + row * D * H + (b[:, None] * D * H + u[None, :]), h_t, mask)
        if SAVE:
            tl.store(cells + row * H + (b[:, None] * H + u[None, :]), c_t.to(dtype), mask)
            tl.store(at, i.to(dtype), mask)
            tl.store(at + H, f.to(dtype), mask)
            tl.store(at + 2 * H, g.to(dtype), mask)
            tl.store(at + 3 * H, o.to(dtype), mask)
        if PACKED:
            c = tl.where(mask, c_t, c)
            h = tl.where(mask, h_t, h)
        else:
            c = c_t
            h = h_t
        row, mask, at = row_ahead, mask_ahead, at_ahead
        x_i, x_f, x_g, x_o = ahead_i, ahead_f, ahead_g, ahead_o
    tl.store(h_n + at_state, h, mask_state)
    tl.store(c_n + at_state, c.to(dtype), mask_state)


@triton.jit(do_not_specialize=COUNTS)
def forward_split(
    gates,
    cells,
    output,
    h_n,
    c_n,
    h_0,
    c_0,
    weight_hh_0,
    weight_hh_1,
    bias_ih_0,
    bias_ih_1,
    bias_hh_0,
    bias_hh_1,
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
    BIAS: tl.constexpr,
    PACKED: tl.constexpr,
    SAVE: tl.constexpr,
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
    dtype: tl.constexpr = output.dtype.element_ty
    SLICES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    CHUNK: tl.constexpr = SPLIT * BLOCK_K
    CHUNKS: tl.constexpr = (H + CHUNK - 1) // CHUNK
    EVEN: tl.constexpr = H % CHUNK == 0
    slice = tl.program_id(0) % SLICES
    b_tile = tl.arange(0, BLOCK_B)
    u = slice * BLOCK_H + tl.arange(0, BLOCK_H)
    unit = u < H
    # Columns of the product: unit after unit, the four gates of each.
    n = tl.arange(0, 4 * BLOCK_H)
    n_unit = slice * BLOCK_H + n // 4
    n_row = (n % 4) * H + n_unit
    k = tl.arange(0, CHUNK)
    n_w = n_row[None, :]
    unit_w = (n_unit < H)[None, :]

    for item in range(tl.program_id(0) // SLICES, D * tiles, groups):
        d = item % D
        tile = item // D
        weight = weight_hh_0
        bias_ih = bias_ih_0
        bias_hh = bias_hh_0
        if d == 1:
            weight = weight_hh_1
            bias_ih = bias_ih_1
            bias_hh = bias_hh_1
        if RESIDENT:
            w = ()
            for chunk in tl.static_range(CHUNKS):
                k_w = chunk * CHUNK + k[:, None]
                w_k = tl.load(weight + (n_w * H + k_w), unit_w & (k_w < H), 0.0)
                w = w + (tl.reshape(w_k, (SPLIT, BLOCK_K, 4 * BLOCK_H)),)
        if BIAS:
            b_i = _bias(bias_ih, bias_hh, u, unit)[None, :]
            b_f = _bias(bias_ih, bias_hh, H + u, unit)[None, :]
            b_g = _bias(bias_ih, bias_hh, 2 * H + u, unit)[None, :]
            b_o = _bias(bias_ih, bias_hh, 3 * H + u, unit)[None, :]
        b = tile * BLOCK_B + b_tile
        at_state = (d * B + b)[:, None] * H + u[None, :]
        mask_state = (b < B)[:, None] & unit[None, :]
        c = tl.load(c_0 + at_state, mask_state, 0.0).to(tl.float32)
        h = tl.load(h_0 + at_state, mask_state, 0.0)  # of its units, for h_n
        gates_d = gates + d.to(tl.int64) * rows * 4 * H
        cells_d = cells + d.to(tl.int64) * rows * H
        counter = counters + item * 32

        length = T
        if PACKED:
            length = tl.load(lengths + tile)
        row_before = tl.zeros((), tl.int64)
        count_before = 0
        for s in range(length):
            t = s + d * (length - 1 - 2 * s)
            row, count = step_rows(steps, t, B, PACKED)
            mask = (b < count)[:, None] & unit[None, :]
            at = gates_d + row * 4 * H + (b[:, None] * 4 * H + u[None, :])
            # On their way while this program waits for the others.
            i = tl.load(at, mask, 0.0)
            f = tl.load(at + H, mask, 0.0)
            g = tl.load(at + 2 * H, mask, 0.0)
            o = tl.load(at + 3 * H, mask, 0.0)
            if s > 0:
                patience = wait(counter, s * SLICES, patience)

            # h of the step before, of all units: a row that has none yet has h_0's.
            before = output + row_before * D * H + d * H + b.to(tl.int64) * D * H
            first = h_0 + (d * B + b).to(tl.int64) * H
            at_h = tl.where(b < count_before, before, first)
            if H % 8 == 0:
                at_h = tl.multiple_of(at_h, 16)  # which Triton 3.9 does not see, for wide loads
            at_h = at_h[:, None] + k[None, :]
            mask_h = (b < count)[:, None]
            if RESIDENT:
                sums = tl.zeros((SPLIT, BLOCK_B, 4 * BLOCK_H), tl.float32)
                h_k = ()
                for chunk in tl.static_range(CHUNKS):
                    for ahead in tl.static_range(len(h_k), min(chunk + 1 + AHEAD, CHUNKS)):
                        at_k = at_h + ahead * CHUNK
                        mask_k = mask_h & (EVEN | (ahead * CHUNK + k < H)[None, :])
                        # .cg: from the second cache, which all programs share
                        part = tl.load(at_k, mask_k, 0.0, cache_modifier=".cg")
                        h_k = h_k + (parts(part, SPLIT, BLOCK_K),)
                    sums = tl.dot(h_k[chunk], w[chunk], sums, input_precision=PRECISION)
            else:
                sums = tl.zeros((BLOCK_B, 4 * BLOCK_H), tl.float32)
                for first_k in range(0, H, CHUNK):
                    k_w = first_k + k[:, None]
                    mask_k = mask_h & (first_k + k < H)[None, :]
                    x = tl.load(at_h + first_k, mask_k, 0.0, cache_modifier=".cg")
                    y = tl.load(weight + (n_w * H + k_w), unit_w & (k_w < H), 0.0)
                    sums = tl.dot(x, y, sums, input_precision=PRECISION)
            if RESIDENT:
                sums = tl.sum(sums, 0)
            # (BLOCK_B, 4 BLOCK_H) into its four gates, by the two bits of the gate's number. In the
            # layout of a sum of products every warp has all of it. Neighbouring columns are other
            # threads', so that this split makes Triton spread the rest of the step over the warps.
            sums_ig, sums_fo = tl.split(tl.reshape(sums, (BLOCK_B, BLOCK_H, 2, 2)))
            sums_i, sums_g = tl.split(sums_ig)
            sums_f, sums_o = tl.split(sums_fo)
            i = sums_i + i.to(tl.float32)
            f = sums_f + f.to(tl.float32)
            g = sums_g + g.to(tl.float32)
            o = sums_o + o.to(tl.float32)
            if BIAS:
                i += b_i
                f += b_f
                g += b_g
                o += b_o
            i = sigmoid(i)
            f = sigmoid(f)
            g = tanh(g)
            o = sigmoid(o)
            c_t = f * c + i * g
            h_t = o * tanh(c_t)
            h_t = tl.where(patience > 0, h_t, float("nan")).to(dtype)
            tl.store(output + row * D * H + d * H + (b[:, None] * D * H + u[None, :]), h_t, mask)
            signal(counter)
            # What only this program and later kernels read is stored after the signal.
            if SAVE:
                tl.store(cells_d + row * H + (b[:, None] * H + u[None, :]), c_t.to(dtype), mask)
                tl.store(at, i.to(dtype), mask)
                tl.store(at + H, f.to(dtype), mask)
                tl.store(at + 2 * H, g.to(dtype), mask)
                tl.store(at + 3 * H, o.to(dtype), mask)
            c = tl.where(mask, c_t, c)
            h = tl.where(mask, h_t, h)
            row_before = row
            count_before = count
        tl.store(h_n + at_state, h, mask_state)
        tl.store(c_n + at_state, c.to(dtype), mask_state)
    if patience == 0:
        tl.store(status, 1)
