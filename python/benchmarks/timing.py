"""Times callables against each other in one process.

They alternate in the order A B B A, so that a drift of the machine (clock, heat, neighbours) falls
on all alike, and what is reported is the median of the ratios of neighbours. torch.utils.benchmark
times one callable at a time, which leaves the drift in the ratio.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median, quantiles
from timeit import Timer, timeit
from typing import Any

import torch

from benchmarks.report import significant

Call = Callable[[], object]
Clock = Callable[[Call, int], float]  # seconds of so many calls, no garbage collected

BLOCK_S = 1e-3  # calls shorter than this are timed several at once: the clock costs nothing then,
# and the caches are as warm as in a loop that runs one of them alone
WARM_UP_S = 0.1


def cpu_clock(call: Call, calls: int) -> float:
    return timeit(call, number=calls)


def cuda_clock(call: Call, calls: int) -> float:
    """Device time between two events on the current stream, launch gaps included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    timer = Timer(call)
    torch.cuda.synchronize()  # nothing queued earlier may run inside the interval
    start.record()
    timer.timeit(calls)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def timed(
    sides: dict[str, Call], clock: Clock = cpu_clock, *, repeats: int, min_time: float
) -> dict[str, Any]:
    """A row's times: of each side the median, milliseconds a call, as `<side>_ms`, `pairs` of
    timings and the `calls` in each; with both "torch" and "fused" also the `ratio` of their times
    in neighbours, its median and its quartiles.

    At least `repeats` pairs are timed, more until `min_time` seconds are spent, always an even
    number so that each side comes first equally often.
    """
    calls = math.ceil(BLOCK_S / _warm_up(sides, clock))
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    pairs, end = 0, time.monotonic() + min_time
    while pairs < repeats or time.monotonic() < end:
        for side in (*sides, *reversed(sides)):
            seconds[side].append(clock(sides[side], calls))
        pairs += 2
    facts: dict[str, Any] = {
        f"{side}_ms": significant(median(of) / calls * 1e3) for side, of in seconds.items()
    }
    if len(sides) > 1:
        facts |= ratios(seconds["torch"], seconds["fused"])
    return facts | {"pairs": pairs, "calls": calls}


def ratios(theirs: list[float], ours: list[float]) -> dict[str, Any]:
    """What a report says of times that were taken in pairs."""
    each = [a / b for a, b in zip(theirs, ours, strict=True)]
    first, middle, third = map(significant, quantiles(each, n=4, method="inclusive"))
    return {"ratio": middle, "ratio_quartiles": [first, third]}


def side_facts(
    side: str, told: dict[str, Any], theirs: list[float], ours: list[float]
) -> dict[str, Any]:
    """What is told of a side by the names that a report has for it, with its times over ours: of
    "fused" and "torch" beside each other, of another peer as an object."""
    if side == "fused":
        return {f"fused_{what}": fact for what, fact in told.items()}
    if side == "torch":
        return {f"torch_{what}": fact for what, fact in told.items()} | ratios(theirs, ours)
    return {side: told | ratios(theirs, ours)}


def _warm_up(sides: dict[str, Call], clock: Clock) -> float:
    """Seconds of the quickest single call seen, of at least two calls of each."""
    quickest, rounds, end = math.inf, 0, time.monotonic() + WARM_UP_S
    while rounds < 2 or time.monotonic() < end:
        quickest = min(quickest, *(clock(call, 1) for call in sides.values()))
        rounds += 1
    return quickest
