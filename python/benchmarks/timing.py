"""Times two callables against each other in one process.

The two alternate in the order A B B A, so that a drift of the machine (clock, heat, neighbours)
falls on both alike, and what is reported is the median of the ratios of neighbours.
torch.utils.benchmark times one callable at a time, which leaves the drift in the ratio.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles

import torch

Call = Callable[[], object]
Clock = Callable[[Call, int], float]  # seconds that so many calls in a row take

BLOCK_S = 1e-3  # calls shorter than this are timed several at once: the clock costs nothing then,
# and the caches are as warm as in a loop that runs one of the two alone
WARM_UP_S = 0.1


@dataclass(frozen=True)
class Comparison:
    """Milliseconds are per call; a ratio is baseline time / candidate time of one pair."""

    baseline_ms: float  # median
    candidate_ms: float  # median
    ratio: float  # median
    ratio_quartiles: tuple[float, float]  # first and third
    pairs: int
    calls: int  # in each timing


def cpu_clock(call: Call, calls: int) -> float:
    start = time.perf_counter_ns()
    for _ in itertools.repeat(None, calls):
        call()
    return (time.perf_counter_ns() - start) * 1e-9


class CudaClock:
    """Device time between two events on the current stream, launch gaps included."""

    def __init__(self) -> None:
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def __call__(self, call: Call, calls: int) -> float:
        torch.cuda.synchronize()  # nothing queued earlier may run inside the interval
        self._start.record()
        for _ in itertools.repeat(None, calls):
            call()
        self._end.record()
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e-3


def clock_for(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else cpu_clock


def compare(
    baseline: Call, candidate: Call, clock: Clock, *, repeats: int, min_time: float
) -> Comparison:
    """Time `baseline` and `candidate` in alternation.

    At least `repeats` pairs are timed, more until `min_time` seconds are spent, always an even
    number so that each of the two comes first equally often.
    """
    with _no_garbage_collection():
        calls = math.ceil(BLOCK_S / _warm_up(baseline, candidate, clock=clock))
        baseline_s: list[float] = []
        candidate_s: list[float] = []
        end = time.monotonic() + min_time
        while len(baseline_s) < repeats or time.monotonic() < end:
            baseline_s.append(clock(baseline, calls))
            candidate_s.append(clock(candidate, calls))
            candidate_s.append(clock(candidate, calls))
            baseline_s.append(clock(baseline, calls))
    ratios = [a / b for a, b in zip(baseline_s, candidate_s, strict=True)]
    first, middle, third = quantiles(ratios, n=4, method="inclusive")
    return Comparison(
        baseline_ms=median(baseline_s) / calls * 1e3,
        candidate_ms=median(candidate_s) / calls * 1e3,
        ratio=middle,
        ratio_quartiles=(first, third),
        pairs=len(ratios),
        calls=calls,
    )


def time_alone(
    call: Call, clock: Clock, *, repeats: int, min_time: float
) -> tuple[float, int, int]:
    """Milliseconds a call (median), timings, and calls in each: of one callable with no peer."""
    with _no_garbage_collection():
        calls = math.ceil(BLOCK_S / _warm_up(call, clock=clock))
        seconds: list[float] = []
        end = time.monotonic() + min_time
        while len(seconds) < repeats or time.monotonic() < end:
            seconds.append(clock(call, calls))
    return median(seconds) / calls * 1e3, len(seconds), calls


def _warm_up(*sides: Call, clock: Clock) -> float:
    """Seconds of the quickest single call seen, of at least two calls of each."""
    quickest = math.inf
    rounds = 0
    end = time.monotonic() + WARM_UP_S
    while rounds < 2 or time.monotonic() < end:
        quickest = min(quickest, *(clock(call, 1) for call in sides))
        rounds += 1
    return quickest


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
