"""Any number of threads, beside busy processes: the settings that users have without knowing, where
a barrier that spins costs a time slice.

Each side of a row is measured in a process of its own, for the threads that one leaves behind would
be in the other's way, while `busy` other processes count as fast as they can.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.measure import call_of, prepared
from benchmarks.process import each_side
from benchmarks.report import line, significant
from benchmarks.suites import FORWARD_BACKWARD, Row
from benchmarks.timing import timed

SECONDS, LIMIT_S = 2.0, 180.0


def side_by_side(row: Row, device: str, **_: Any) -> dict[str, Any]:
    with busy(row.busy or 0):
        facts = each_side(milliseconds, row, unit="ms", limit_s=LIMIT_S)
    if "error" not in facts:
        facts["ratio"] = significant(facts["torch_ms"] / facts["fused_ms"])
    return facts


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many other processes that never rest."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def milliseconds(side: str, row: Row) -> float:
    """Of a call, the median."""
    torch.set_num_threads(row.threads or 1)
    torch.set_grad_enabled(row.pass_ == FORWARD_BACKWARD)
    call = call_of(prepared(side, row))
    return timed({side: call}, repeats=5, min_time=SECONDS)[f"{side}_ms"]


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What falls short: a row of several threads over 1.5 times our own time with 2, beside as many
    busy processes, one slower than nn.LSTM or one that has failed."""
    short = []
    whole = [row for row in rows if "error" not in row]
    two = {(row["case"], row["busy"]): row["fused_ms"] for row in whole if row["threads"] == 2}
    for row in rows:
        if "error" in row:
            short.append(line(row))
            continue
        times = row["fused_ms"] / two.get((row["case"], row["busy"]), row["fused_ms"])
        if (row["threads"] > 1 and times > 1.5) or row["ratio"] < 1:
            short.append(f"{line(row)}: {times:.2f} x 2 threads")
    return short
