"""What a step of the CUDA kernels takes, by torch's profiler: microseconds of the forward and the
backward kernel alone, 0 where a product and a fused cell serve each step."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import call_of, forced, prepared
from benchmarks.report import significant
from benchmarks.suites import Row

CALLS = 3


def measured(row: Row, device: str, **times: Any) -> dict[str, Any]:
    with forced("cuda"):
        call = call_of(prepared("fused", row, device))
        call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as run:
            for _ in range(CALLS):
                call()
            torch.cuda.synchronize()
    return us_a_step([(of.name, of.device_time) for of in run.events()], CALLS * row.case.T)


def us_a_step(kernels: list[tuple[str, float]], steps: int) -> dict[str, float]:
    """Of the two kernels, by the names and microseconds of all that ran."""
    found = {}
    for which in ("forward", "backward"):
        us = sum(of for name, of in kernels if f"{which}_kernel" in name)
        found[f"{which}_us_a_step"] = significant(us / steps)
    return found
