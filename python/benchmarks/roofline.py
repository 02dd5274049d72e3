"""What a CPU could do at best, measured in the same run: the floor under a row's time.

    roofline time = max(FLOPs / rate of one large product, bytes / bandwidth of a copy)

The rate is the better of torch.mm's and our own tile's in that dtype; the copy moves as many bytes
as the row must, so that weights which stay in a cache are not held against memory.
"""

from __future__ import annotations

import math
import timeit
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from benchmarks.measure import DTYPES
from benchmarks.report import significant
from benchmarks.suites import FORWARD_BACKWARD, Case, Row
from fused_lstm import FusedLSTM

SIZE = 1536  # of the large product: 7.2 GFLOP, and it fits no first- or second-level cache
TRIES = 15  # the best counts: neighbours on the machine take up to a third of its speed
LARGEST = 2**28  # bytes to copy: larger than any cache


def weights(case: Case) -> int:
    """Elements of all matrices, without biases."""
    options = {**case.options(), "bias": False, "device": "meta"}
    lstm = nn.LSTM(case.input_size, case.hidden_size, **options)
    return sum(weight.numel() for weight in lstm.parameters())


def flops(case: Case, pass_: str) -> int:
    """Of the matrix products, two for each multiplication and addition; the backward pass has
    twice the forward's."""
    return 2 * case.N * weights(case) * (3 if pass_ == FORWARD_BACKWARD else 1)


def traffic(case: Case, pass_: str, itemsize: int) -> int:
    """Bytes that must be read or written: input, weights and output once; with the backward pass
    the weights twice, and the gradients of all three."""
    data = case.N * (case.input_size + case.width)
    times = (2, 3) if pass_ == FORWARD_BACKWARD else (1, 1)
    return itemsize * (times[0] * data + times[1] * weights(case))


def facts(row: Row, fused_ms: float) -> dict[str, Any]:
    """`gflops`, the `product_gflops` and `copy_gbs` that they are held against, and `roofline`: the
    share of the floor in the time, 1 being as quick as can be."""
    work = flops(row.case, row.pass_)
    moved = traffic(row.case, row.pass_, DTYPES[row.dtype].dtype.itemsize)
    threads = torch.get_num_threads()
    rate = product_gflops(row.dtype, threads)
    bandwidth = copy_gbs(min(2 ** round(math.log2(moved)), LARGEST), threads)
    floor_ms = max(work / rate, moved / bandwidth) * 1e-6
    return {
        "gflops": significant(work / fused_ms * 1e-6),
        "roofline": significant(floor_ms / fused_ms, 3),
        "product_gflops": rate,
        "copy_gbs": bandwidth,
    }


@cache
def product_gflops(dtype: str, threads: int) -> float:
    """Of one large product, by torch.mm or by our kernel in one step of as many rows."""
    place: dict[str, Any] = {"dtype": DTYPES[dtype].dtype}
    a, b = (torch.randn(SIZE, SIZE, **place) for _ in range(2))
    H = SIZE // 4
    lstm, step = FusedLSTM(SIZE, H, **place), a[None]
    with torch.no_grad():
        theirs = 2 * SIZE**3 / best(lambda: torch.mm(a, b))
        ours = 2 * SIZE * 4 * H * (SIZE + H) / best(lambda: lstm(step))
    return significant(max(theirs, ours) * 1e-9)


@cache
def copy_gbs(moved: int, threads: int) -> float:
    """GB/s, read and written, of a copy that moves so many bytes."""
    source = torch.randn(max(moved // 8, 1))
    target = torch.empty_like(source)
    calls = max(2**22 // moved, 1)  # a small copy is over before the clock has ticked
    return significant(8 * source.numel() / best(lambda: target.copy_(source), calls) * 1e-9)


def best(call: Callable[[], object], calls: int = 1) -> float:
    """Seconds of a call where so many were quickest."""
    call()
    return min(timeit.repeat(call, number=calls, repeat=TRIES)) / calls
