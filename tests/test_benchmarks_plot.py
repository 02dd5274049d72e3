"""The README's tables and plot; the GPU result that they are drawn from here is made up."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

PYTHON = Path(__file__).resolve().parent.parent / "python"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package, which is run from its folder and not installed."""
    monkeypatch.syspath_prepend(str(PYTHON))
    import benchmarks.plot

    return benchmarks


@pytest.fixture
def made_up(benchmarks: ModuleType, tmp_path: Path) -> Path:
    """A result as the command writes it, with numbers that nobody measured."""
    rows = []
    for at, row in enumerate(benchmarks.suites.rows("gpu", ("cuda", "triton"))):
        facts = {**row.facts(), "suite": row.suite, "torch_ms": 4.0, "fused_ms": 2.0,
                 "fused_us_per_step": 2000 / row.case.T, "ratio": 1 + at % 7 / 2}  # fmt: skip
        if row.pass_ == "forward+backward":
            facts |= {"torch_mib": 400.0, "fused_mib": 300.0, "memory_ratio": 0.75}
        rows.append(facts)
    rows[1] = {key: fact for key, fact in rows[1].items() if "_" not in key and key != "ratio"}
    rows[1]["error"] = "made up"
    document = {"format": 1, "benchmark": "gpu", "suite": "gpu", "device": "cuda", "rows": rows,
                "machine": {"gpu": "Made Up GPU", "processor": "made up", "cores": 1},
                "versions": {"torch": "0.0"}, "commit": "0123456789ab"}  # fmt: skip
    path = tmp_path / "made-up-gpu-gpu-cuda.json"
    benchmarks.report.write(document, path)
    return path


def test_tables(benchmarks: ModuleType, made_up: Path) -> None:
    results = [str(made_up), *map(str, benchmarks.report.RESULTS.glob("*-seeds-cpu.json"))]
    result = CliRunner().invoke(benchmarks.plot.main, results)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    for line in (
        "Made Up GPU, torch 0.0, commit 0123456789ab",
        "headline",
        "hard",
        "| B 36, T 48, I 48, H 96, 2 layers |",
    ):
        assert (line in lines) == ("2 layers" not in line)
    headline = next(line for line in lines if line.startswith("| B 16, T 1024, I 768, H 768 |"))
    assert headline.startswith("| B 16, T 1024, I 768, H 768 | 1.00 (1.95 µs) | failed |")
    assert any(line.startswith("| B 16, T 1024, I 768, H 768 (triton) |") for line in lines)
    assert any(", packed, lengths 64 to 512 |" in line for line in lines)
    start = lines.index("memory") + 4
    memory = lines[start : lines.index("", start)]
    assert len(memory) >= len(benchmarks.suites.SUITES["memory"].cases)
    assert all("0.75 (300 of 400 MiB)" in line or "failed" in line for line in memory)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_picture_of_the_same_result(
    benchmarks: ModuleType, tmp_path: Path, suffix: str
) -> None:
    pytest.importorskip("matplotlib")
    (kept,) = benchmarks.report.RESULTS.glob("amd-epyc-26-2-*-grid-cpu.json")
    pictures = [tmp_path / f"{name}{suffix}" for name in ("one", "two")]
    for out in pictures:
        done = CliRunner().invoke(benchmarks.plot.main, [str(kept), "--out", str(out)])
        assert done.exit_code == 0, done.output
    assert 5_000 < pictures[0].stat().st_size < 200_000
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_kept_cpu_result_gives_the_table(benchmarks: ModuleType) -> None:
    for path in benchmarks.report.RESULTS.glob("*-seeds-cpu.json"):
        document = json.loads(path.read_text())
        table = benchmarks.plot.tables(document).splitlines()
        assert table[0].startswith("| case | fp32 forward | fp32 forward + backward |")
        assert len(table) == 2 + len(benchmarks.suites.SUITES["seeds"].cases)
        rows = {(r["case"], r["dtype"], r["pass"]): r["ratio"] for r in document["rows"]}
        first = next(line for line in table if line.startswith("| B 36, T 48, I 48, H 96 |"))
        assert first.split(" | ")[1] == f"{rows['frankenstein', 'fp32', 'forward']:.2f}"
        assert any(line.startswith("| one step, B 1, I 48, H 96 |") for line in table)


def test_plot_needs_something_to_draw(benchmarks: ModuleType, tmp_path: Path) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"format": 1, "benchmark": "gpu", "suite": "gpu", "rows": [],
                                 "versions": {}, "machine": {"processor": "made up"}}))  # fmt: skip
    for out, message in (("a.svg", "grid and scaling"), ("a.pdf", "expected FILE.svg or FILE.png")):
        result = CliRunner().invoke(benchmarks.plot.main, [str(empty), "--out", out])
        assert result.exit_code and message in result.output
