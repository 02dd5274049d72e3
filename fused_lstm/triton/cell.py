"""The parts that the kernels share: safe activations, and the barrier between programs."""

import triton
import triton.language as tl


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
