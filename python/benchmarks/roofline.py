"""What a CPU could do at best, measured in the same run: the floor under a row's time.

    roofline time = max(FLOPs / rate of one large product, bytes / bandwidth of a copy)

The rate is the better of torch.mm's and our own tile's in that dtype; the copy moves as many bytes
as the row must, so that weights which stay in a cache are not held against memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from benchmarks import report
from benchmarks.measure import DTYPES
from benchmarks.suites import FORWARD_BACKWARD, Case, Row

SIZE = 1536  # of the large product: 7.2 GFLOP, and it fits no first- or second-level cache
TRIES = 15  # the best counts: neighbours on the machine take up to a third of its speed
LARGEST = 2**28  # bytes to copy: larger than any cache


def flops(case: Case, pass_: str) -> int:
    """Of the matrix products, two for each multiplication and addition; the backward pass has
    twice the forward's."""
    batch_sizes = case.batch_sizes()
    N = case.T * case.B if batch_sizes is None else sum(batch_sizes)
    products = 2 * N * sum(math.prod(shape) for shape in matrices(case))
    return products * (3 if pass_ == FORWARD_BACKWARD else 1)


def traffic(case: Case, pass_: str, itemsize: int) -> int:
    """Bytes that must be read or written: input, weights and output once; with the backward pass
    the weights twice, and the gradients of all three."""
    batch_sizes = case.batch_sizes()
    N = case.T * case.B if batch_sizes is None else sum(batch_sizes)
    D = 2 if case.bidirectional else 1
    data = N * (case.input_size + D * (case.proj_size or case.hidden_size))
    weights = sum(math.prod(shape) for shape in matrices(case))
    return itemsize * (2 * data + 3 * weights if pass_ == FORWARD_BACKWARD else data + weights)


def matrices(case: Case) -> list[tuple[int, int]]:
    """The shapes of the weights of all layers and directions, without biases."""
    H, P, D = case.hidden_size, case.proj_size or case.hidden_size, 2 if case.bidirectional else 1
    shapes = []
    for layer in range(case.num_layers):
        shapes += [(4 * H, D * P if layer else case.input_size), (4 * H, P)] * D
        shapes += [(P, H)] * (D if case.proj_size else 0)
    return shapes


def facts(row: Row, fused_ms: float) -> dict[str, Any]:
    """`gflops`, and `roofline`: the share of the floor in the time, 1 being as quick as can be."""
    work = flops(row.case, row.pass_)
    moved = traffic(row.case, row.pass_, DTYPES[row.dtype].dtype.itemsize)
    threads = torch.get_num_threads()
    rate = max(product_gflops(row.dtype, threads).values())
    bandwidth = copy_gbs(min(2 ** round(math.log2(moved)), LARGEST), threads)
    floor_ms = max(work / rate, moved / bandwidth) * 1e-6
    return {
        "gflops": report.significant(work / fused_ms * 1e-6),
        "roofline": report.significant(floor_ms / fused_ms, 3),
    }


@cache
def product_gflops(dtype: str, threads: int) -> dict[str, float]:
    """Of one large product by torch.mm, and by our kernel in one step of as many rows."""
    from fused_lstm import FusedLSTM

    assert threads == torch.get_num_threads()
    place: dict[str, Any] = {"dtype": DTYPES[dtype].dtype}
    a, b = (torch.randn(SIZE, SIZE, **place) for _ in range(2))
    H = SIZE // 4
    lstm, step = FusedLSTM(SIZE, H, **place), a[None]
    with torch.no_grad():
        seconds = {"torch.mm": best(lambda: torch.mm(a, b)), "ours": best(lambda: lstm(step))}
    work = {"torch.mm": 2 * SIZE**3, "ours": 2 * SIZE * 4 * H * (SIZE + H)}
    return {side: report.significant(work[side] / seconds[side] * 1e-9) for side in seconds}


@cache
def copy_gbs(moved: int, threads: int) -> float:
    """GB/s, read and written, of a copy that moves so many bytes."""
    assert threads == torch.get_num_threads()
    source = torch.randn(max(moved // 8, 1))
    target = torch.empty_like(source)
    calls = max(2**22 // moved, 1)  # a small copy is over before the clock has ticked

    def copies() -> None:
        for _ in range(calls):
            target.copy_(source)

    return report.significant(8 * source.numel() * calls / best(copies) * 1e-9)


def measured(dtypes: list[str], counts: list[int]) -> dict[str, Any]:
    """The document's record of what the rows were held against."""
    before = torch.get_num_threads()
    found: dict[str, Any] = {}
    for threads in counts:
        torch.set_num_threads(threads)
        found[f"threads {threads}"] = {
            "product_gflops": {dtype: product_gflops(dtype, threads) for dtype in dtypes},
            "copy_gbs": {f"{size >> 20} MiB": copy_gbs(size, threads) for size in (2**22, LARGEST)},
        }
    torch.set_num_threads(before)
    return found


def best(call: Callable[[], object]) -> float:
    """Seconds of the quickest call."""
    call()
    seconds = []
    for _ in range(TRIES):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
