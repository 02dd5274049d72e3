"""What the kernels share: the cell, a step's rows, what is where, products with W_hh, the barrier.

b are a tile's BLOCK_B sequences, u its BLOCK_H hidden units, `gates` a tuple of i, f, g, o.
"""

import triton
import triton.language as tl

# What changes from call to call must not make Triton compile anew.
COUNTS = ("T", "B", "rows", "patience", "groups", "tiles")


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x). Exact limits: e^-x overflows to infinity for x < -88, and 1 / inf is 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Of |x|, from e^(-2|x|) in (0, 1], which can't overflow; near 0, where that cancels, from
    Taylor's series, whose next term is below a third of float32's epsilon."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    p = -1382.0 / 155925.0 * y + 62.0 / 2835.0
    p = p * y - 17.0 / 315.0
    p = p * y + 2.0 / 15.0
    p = p * y - 1.0 / 3.0
    near = x + x * y * p
    return tl.where(size < 0.25, near, tl.where(x < 0.0, -far, far))


@triton.jit
def cell(sums, x, bias, c):
    """The activated gates, c_t and h_t, from h_{t-1} W_hh^T, x_t W_ih^T, biases and c_{t-1}."""
    z = [sums[gate] + x[gate].to(tl.float32) for gate in (0, 1, 2, 3)]
    if bias is not None:
        z = [z[gate] + bias[gate] for gate in (0, 1, 2, 3)]
    i = sigmoid(z[0])
    f = sigmoid(z[1])
    g = tanh(z[2])
    o = sigmoid(z[3])
    c_t = f * c + i * g
    return (i, f, g, o), c_t, o * tanh(c_t)


@triton.jit
def cell_gradient(dh, dc, gates, c, c_before):
    """The gradients of the gates before activation, in the gates' dtype, and of c_{t-1}."""
    i, f, g, o = [gate.to(tl.float32) for gate in gates]
    tanh_c = tanh(c.to(tl.float32))
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    d_i = dc * g * i * (1.0 - i)
    d_f = dc * c_before.to(tl.float32) * f * (1.0 - f)
    d_g = dc * i * (1.0 - g * g)
    d_o = dh * tanh_c * o * (1.0 - o)
    return [of.to(gates[0].dtype) for of in (d_i, d_f, d_g, d_o)], dc * f


# --- what is where --------------------------------------------------------------------------------


@triton.jit
def of_direction(d, pointers):
    return pointers[0] if len(pointers) == 1 else tl.where(d == 1, pointers[1], pointers[0])


@triton.jit
def length_of(packing, tile, T):
    """The steps of a tile's longest sequence."""
    return T if packing is None else tl.load(packing[1] + tile)


@triton.jit
def rows_of_turn(packing, s, length, reverse, B):
    """The first row and the number of rows (0 past the end) of a recurrence's s-th step, which is
    the s-th from the end where `reverse` is 1, not 0."""
    s_inside = tl.minimum(s, length - 1)
    t = s_inside + reverse * (length - 1 - 2 * s_inside)
    if packing is None:
        row = t.to(tl.int64) * B
        count = B
    else:
        row = tl.load(packing[0] + 2 * t).to(tl.int64)
        count = tl.load(packing[0] + 2 * t + 1)
    return row, tl.where(s < length, count, 0)


@triton.jit
def matrix(rows, columns, WIDTH: tl.constexpr):
    """Where these rows and columns are in a matrix of WIDTH columns."""
    return rows[:, None] * WIDTH + columns[None, :]


@triton.jit
def inside(b, count, u, H: tl.constexpr):
    """The mask of the first `count` sequences and of the units below H."""
    return (b < count)[:, None] & (u < H)[None, :]


@triton.jit
def load_gates(at, mask, APART: tl.constexpr):
    return [tl.load(at + gate * APART, mask, 0.0) for gate in (0, 1, 2, 3)]


@triton.jit
def store_gates(at, gates, mask, APART: tl.constexpr):
    for gate in tl.static_range(4):
        tl.store(at + gate * APART, gates[gate], mask)


# --- products with W_hh in the split kernels: sums over K, CHUNK = SPLIT * BLOCK_K at a time ------


@triton.jit
def parts(x, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr):
    """The columns of x (BLOCK_B, SPLIT * BLOCK_K) in parts: (SPLIT, BLOCK_B, BLOCK_K).

    Loaded as a matrix and taken apart afterwards, because Triton 3.7 to 3.9 lay out a load of three
    dimensions for a shared memory that is swizzled across parts: 80 to 125 more registers with
    Triton 3.7, and spills.
    """
    return tl.permute(tl.reshape(x, (x.shape[0], SPLIT, BLOCK_K)), (1, 0, 2))


@triton.jit
def resident_weight(
    at, mask, k, STRIDE: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The chunks of W (K, N) for `resident_product`, (SPLIT, BLOCK_K, N) each: Triton keeps them in
    shared memory. `at` are the addresses of the first, `k` its rows, STRIDE elements apart."""
    CHUNK: tl.constexpr = SPLIT * BLOCK_K
    w = ()
    for chunk in tl.static_range((K + CHUNK - 1) // CHUNK):
        mask_k = mask & ((K % CHUNK == 0) | (chunk * CHUNK + k < K))
        w_k = tl.load(at + chunk * CHUNK * STRIDE, mask_k, 0.0)
        w = w + (tl.reshape(w_k, (SPLIT, BLOCK_K, w_k.shape[-1])),)
    return w


@triton.jit
def resident_product(at, mask, k, w, K: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr):
    """x W, the chunks of x loaded AHEAD of the product. Of the first, `at` are the addresses and
    `k` the columns, as a matrix or as the products take them, (SPLIT, BLOCK_B, BLOCK_K).

    Triton gives a warp each of the SPLIT products, and every warp all of their sum. The callers
    take it apart by columns that are other threads', which makes Triton spread the rest of the step
    over the warps.
    """
    SPLIT: tl.constexpr = w[0].shape[0]
    BLOCK_K: tl.constexpr = w[0].shape[1]
    CHUNK: tl.constexpr = SPLIT * BLOCK_K
    EVEN: tl.constexpr = CHUNK * len(w) == K
    MATRIX: tl.constexpr = len(at.shape) == 2
    sums = tl.zeros((SPLIT, at.shape[-2], w[0].shape[2]), tl.float32)
    x = ()
    for chunk in tl.static_range(len(w)):
        for ahead in tl.static_range(len(x), min(chunk + 1 + AHEAD, len(w))):
            mask_k = mask & (EVEN | (ahead * CHUNK + k < K))
            # .cg: from the second cache, which all programs share
            x_k = tl.load(at + ahead * CHUNK, mask_k, 0.0, cache_modifier=".cg")
            if MATRIX:
                x_k = parts(x_k, SPLIT, BLOCK_K)
            x = x + (x_k,)
        sums = tl.dot(x[chunk], w[chunk], sums, input_precision=PRECISION)
    return tl.sum(sums, 0)


@triton.jit
def streamed_product(
    at, mask, at_w, mask_w, STRIDE: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """x W, both read anew, in chunks; `at` and `at_w` are the addresses of the first."""
    CHUNK: tl.constexpr = at.shape[1]
    k = tl.arange(0, CHUNK)
    sums = tl.zeros((at.shape[0], at_w.shape[1]), tl.float32)
    for first in range(0, K, CHUNK):
        mask_x = mask & (first + k < K)[None, :]
        x = tl.load(at + first, mask_x, 0.0, cache_modifier=".cg")
        y = tl.load(at_w + first * STRIDE, mask_w & (first + k < K)[:, None], 0.0)
        sums = tl.dot(x, y, sums, input_precision=PRECISION)
    return sums


# --- the barrier between the programs of a group --------------------------------------------------


@triton.jit
def signal(counter):
    """This program's stores of this step are done: counts it, released to the whole device."""
    tl.debug_barrier()  # of all threads, before the one that counts
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, target, patience):
    """Waits until `target` signals are counted, for `patience` polls at most; returns `patience`.

    Or 0, if the wait was broken off: the caller then turns what follows into NaN, and its further
    waits end at once. A wrong result is better than a device that hangs.
    """
    seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    left = patience
    while (seen < target) & (left > 0):
        seen = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
        left -= 1
    return tl.where(seen >= target, patience, 0)
