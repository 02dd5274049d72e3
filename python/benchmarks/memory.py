"""Peak memory of a call on a CPU, each side in fresh processes: by how much the process grows.

A process makes the LSTM and its input, runs the smallest case once so that libraries and threads
are there, and then the case once. What it grew by at its peak, beyond what was resident before, is
the call's: results, gradients, what is saved for the backward pass and workspaces. The case LENGTHS
runs all of them one after the other, by how much the process grows meanwhile. Linux only.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import call_of, prepared
from benchmarks.process import each_side
from benchmarks.report import significant
from benchmarks.suites import FORWARD_BACKWARD, LENGTHS, Case, Row

TINY = Case("tiny", 2, 3, 4, 8)
LIMIT_S = 120.0


def measured(row: Row, device: str, **_: Any) -> dict[str, Any]:
    row = replace(row, threads=torch.get_num_threads())
    facts = each_side(grown_mib, row, unit="mib", limit_s=LIMIT_S)
    if "error" not in facts:
        facts["memory_ratio"] = significant(facts["fused_mib"] / max(facts["torch_mib"], 1 / 64))
    return facts


def grown_mib(side: str, row: Row) -> float:
    """MiB by which this process, a fresh one, grows at its peak in what is measured of the row."""
    torch.set_grad_enabled(row.pass_ == FORWARD_BACKWARD)
    torch.set_num_threads(row.threads or 1)
    call_of(prepared(side, row, case=TINY))()
    whole = prepared(side, row)
    calls = [call_of(whole)]
    if row.case == LENGTHS:
        for _ in range(3):
            calls[0]()
        x = whole.x.detach()
        starts = (x[:n].requires_grad_(whole.x.requires_grad) for n in range(1, LENGTHS.T + 1))
        calls = [call_of(whole._replace(x=start)) for start in starts]
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted
    before = kib("VmRSS")
    for call in calls:
        call()
    return significant(max(kib("VmHWM") - before, 0) / 1024)


def kib(name: str) -> float:
    """What Linux says of this process's memory."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return float(found[1]) if found else 0.0
