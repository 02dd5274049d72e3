"""What the thread table's verdict calls a shortfall."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PYTHON = Path(__file__).resolve().parent.parent / "python"


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, whose package is run from its folder and not installed."""
    monkeypatch.syspath_prepend(str(PYTHON))
    import benchmarks.threads

    return benchmarks.threads


def entry(
    threads: Any, count: int, busy: int, fused: float, torch: float, case: int = 0
) -> dict[str, Any]:
    from benchmarks.suites import SUITES

    of = SUITES["threads"].cases[case]
    row = threads.Row("threads", of, "fp32", "forward", threads=count, busy=busy)
    return row.facts() | {"torch_ms": torch, "fused_ms": fused, "ratio": torch / fused}


def test_nothing_falls_short(threads: Any) -> None:
    rows = [
        entry(threads, 1, 0, fused=1.9, torch=1.9),  # as much as one thread takes
        entry(threads, 2, 0, fused=1.0, torch=2.0),
        entry(threads, 64, 0, fused=1.5, torch=9.0),
    ]
    assert threads.verdict(rows) == []
    assert threads.verdict([]) == []


def test_over_one_and_a_half_times_two_threads(threads: Any) -> None:
    """Of the same case beside as many busy processes."""
    rows = [
        entry(threads, 2, 0, fused=1.0, torch=9.0),
        entry(threads, 4, 0, fused=1.6, torch=9.0),
        entry(threads, 4, 1, fused=1.6, torch=9.0),
        entry(threads, 2, 1, fused=1.2, torch=9.0),
        entry(threads, 4, 0, fused=1.6, torch=9.0, case=1),
        entry(threads, 2, 0, fused=1.2, torch=9.0, case=1),
    ]
    (short,) = threads.verdict(rows)
    assert threads.line(rows[1]) in short and "1.60 x 2 threads" in short


def test_slower_than_torch(threads: Any) -> None:
    (short,) = threads.verdict([entry(threads, 2, 0, fused=1.0, torch=0.98)])
    assert "ratio 0.98:" in short


def test_an_entry_that_failed_falls_short_and_is_no_yardstick(threads: Any) -> None:
    failed = entry(threads, 2, 0, fused=1.0, torch=1.0)
    for name in ("torch_ms", "fused_ms", "ratio"):
        del failed[name]
    rows = [failed | {"error": "fused: out of time"}, entry(threads, 4, 0, fused=5.0, torch=9.0)]
    (short,) = threads.verdict(rows)
    assert "out of time" in short
