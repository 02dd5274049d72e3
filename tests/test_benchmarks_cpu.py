"""The CPU suites: threads, rooflines, peak memory, time budget, and the curves drawn of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

PYTHON = Path(__file__).resolve().parent.parent / "python"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, which is run from its folder and not installed; threads are set back."""
    monkeypatch.syspath_prepend(str(PYTHON))
    import benchmarks.lstm
    import benchmarks.plot

    threads = torch.get_num_threads()
    yield benchmarks
    torch.set_num_threads(threads)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"shortest": 2},
    "everything": {"num_layers": 2, "bidirectional": True, "proj_size": 7, "shortest": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("pass_", ["forward", "forward+backward"])
def test_flops_are_those_that_the_operators_count(
    benchmarks: ModuleType, options: dict[str, Any], pass_: str
) -> None:
    case = benchmarks.suites.Case("tried here", 3, 9, 5, 17, **options)
    row = benchmarks.suites.Row("tried here", case, "fp32", pass_)
    side = benchmarks.measure.prepared("fused", row)
    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(pass_ == "forward+backward"), counter:
        output = benchmarks.measure.data(side.lstm(side.x, side.hx)[0])
        if pass_ != "forward":
            output.sum().backward()
    assert benchmarks.roofline.flops(case, pass_) == counter.get_total_flops()


def test_traffic_is_what_goes_in_and_out(benchmarks: ModuleType) -> None:
    case = benchmarks.suites.Case("tried here", 3, 9, 5, 17)
    data, weights = 27 * (5 + 17), 68 * (5 + 17)
    assert benchmarks.roofline.traffic(case, "forward", 4) == 4 * (data + weights)
    both = benchmarks.roofline.traffic(case, "forward+backward", 2)
    assert both == 2 * (2 * data + 3 * weights)


def test_share_of_the_roofline(benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rates of our own: first the product is the floor, then the copy."""
    roofline = benchmarks.roofline
    case = benchmarks.suites.Case("tried here", 3, 9, 5, 17)
    row = benchmarks.suites.Row("tried here", case, "fp32", "forward")
    work = roofline.flops(case, "forward")
    monkeypatch.setattr(roofline, "product_gflops", lambda *_: 2.0)
    monkeypatch.setattr(roofline, "copy_gbs", lambda *_: 1e9)
    at_best = work / 2.0 * 1e-6  # ms
    assert roofline.facts(row, 4 * at_best)["roofline"] == 0.25
    assert roofline.facts(row, 4 * at_best)["gflops"] == pytest.approx(0.5, rel=1e-3)
    monkeypatch.setattr(roofline, "copy_gbs", lambda *_: 1e-3)
    moved = roofline.traffic(case, "forward", 4)
    assert roofline.facts(row, moved / 1e-3 * 1e-6)["roofline"] == 1


def test_cpu_suite_has_both_thread_counts_and_its_rooflines(
    benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmarks.roofline, "SIZE", 64)
    monkeypatch.setattr(benchmarks.roofline, "LARGEST", 2**20)
    monkeypatch.setattr(benchmarks.timing, "WARM_UP_S", 0)
    counts = set()
    real = benchmarks.timing.timed

    def timed(*arguments: Any, **options: Any) -> Any:
        counts.add(torch.get_num_threads())
        return real(*arguments, **options)

    monkeypatch.setattr(benchmarks.timing, "timed", timed)
    out = tmp_path / "out.json"
    arguments = ["--suite", "cpu", "--case", "one-step-96", "--repeats", "2", "--min-time", "0"]
    result = CliRunner().invoke(benchmarks.lstm.main, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert counts == {1, 2}
    assert [(r["dtype"], r["pass"], r["threads"]) for r in document["rows"]] == [
        (dtype, pass_, threads) for dtype in ("fp32", "bf16")
        for pass_ in ("forward", "forward+backward") for threads in (1, 2)
    ]  # fmt: skip
    for row in document["rows"]:
        gflops = 2 * 384 * (48 + 96) * (3 if "+" in row["pass"] else 1) / row["fused_ms"] * 1e-6
        assert row["gflops"] == pytest.approx(gflops, rel=1e-3) and row["roofline"] > 0
        assert f"gflops {row['gflops']}" in result.output
        assert row["product_gflops"] > 0 and row["copy_gbs"] > 0
    (line,) = [line for line in result.output.splitlines() if "rows have a ratio below 1" in line]
    slower = sum(row["ratio"] < 1 for row in document["rows"])
    assert line == f"{slower} of 8 rows have a ratio below 1"


def test_time_budget_names_what_is_left(benchmarks: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--suite", "smoke", "--minutes", "0", "--out", str(out)]
    result = CliRunner().invoke(benchmarks.lstm.main, arguments)
    assert result.exit_code == 0, result.output
    assert "no time left for 6 rows, from small B3 T5 I4 H17 on" in result.output
    assert json.loads(out.read_text())["skipped"]["rows"] == 6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_command(
    benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = benchmarks.suites.Case("tried here", B=64, T=200, input_size=8, hidden_size=64,
                                  passes=("forward",))  # fmt: skip
    suite = benchmarks.suites.Suite((case,), ("fp32",), how="memory")
    monkeypatch.setitem(benchmarks.suites.SUITES, "memory-cpu", suite)
    out = tmp_path / "out.json"
    arguments = ["--suite", "memory-cpu", "--threads", "1", "--out", str(out)]
    result = CliRunner().invoke(benchmarks.lstm.main, arguments)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(out.read_text())["rows"]
    for side in ("torch", "fused"):
        assert 3 < row[f"{side}_mib"] < 40  # the output alone is 3.125
    assert row["memory_ratio"] == pytest.approx(row["fused_mib"] / row["torch_mib"], rel=1e-3)


def made_up(benchmarks: ModuleType, suite: str) -> dict[str, Any]:
    """A result whose times are T x B x H^2 us with two threads, nn.LSTM's twice as much."""
    rows = []
    for row in benchmarks.suites.rows(suite):
        facts = row.facts()
        ms = 1e-3 * facts["T"] * facts["B"] * facts["H"] ** 2 * (2 if row.threads == 1 else 1)
        rows.append({**facts, "torch_ms": 2 * ms, "fused_ms": ms, "ratio": 2.0})
    return {"format": 1, "benchmark": "lstm", "suite": suite, "device": "cpu", "threads": 2,
            "rows": rows, "machine": {"processor": "made up", "cores": 2},
            "versions": {"torch": "0.0"}, "commit": "0123456789ab"}  # fmt: skip


def test_slopes(benchmarks: ModuleType) -> None:
    slope = benchmarks.plot.slope
    assert slope({n: 5.0 * n**2 for n in (1, 10, 100)}) == pytest.approx(2)
    assert slope({1: 9.0, 10: 7.0, **{n: n / 7 for n in (100, 1000, 10000)}}) == pytest.approx(1)
    table = benchmarks.plot.tables(made_up(benchmarks, "scaling")).splitlines()
    for size, value in (("T", "1.00"), ("B", "1.00"), ("H", "2.00")):
        assert f"| {size} | forward+backward | 2 | {value} | {value} |" in table


@pytest.mark.parametrize("suite", ["grid", "scaling"])
def test_curves(benchmarks: ModuleType, tmp_path: Path, suite: str) -> None:
    pytest.importorskip("matplotlib")
    document = made_up(benchmarks, suite)
    result, out = tmp_path / "result.json", tmp_path / "curves.svg"
    result.write_text(json.dumps(document))
    done = CliRunner().invoke(benchmarks.plot.main, [str(result), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert 5_000 < out.stat().st_size < 150_000
    drawn = out.read_text()
    labels = {"grid": ("bf16, forward+backward", "H (B 32, T 64"),
              "scaling": ("slope 2.00", "100,000", "over H (")}  # fmt: skip
    for label in labels[suite]:
        assert label in drawn
