"""The one format every benchmark reports in: a JSON document and the table printed from it.

{"format": 1, "benchmark", "suite", "device", "threads", "machine": {}, "versions": {},
 "environment": {}, "load", "commit", "dirty", "rows": [{}, ...]}

A row is one case, dtype and pass: the sizes B, T, I, H (and the options not at their default),
`torch_ms` and `fused_ms` (medians, milliseconds a call), `torch_us_per_step` and
`fused_us_per_step` (the same over T), `ratio` (median of the paired ratios torch / fused: above 1
fused_lstm is the faster), `ratio_quartiles`, `pairs` and `calls` (in each timing).

A suite may add keys to its rows; none of these changes its meaning. Known ones: `suite`, `backend`
(the one that was forced), `distance` (the largest, over all results, between ours and nn.LSTM's,
relative to its norm), `torch_mib`, `fused_mib` and `memory_ratio` (peak memory that one call adds
to what was allocated before; fused / torch: below 1 fused_lstm needs less), `published` (others'
figures for the same case: milliseconds, and those over ours), `threads` (CPU threads, where rows
differ in them), `gflops` (of ours) and `roofline` (the least time that the machine allows over
ours: roofline.py), `ratio_to_fp32` (nn.LSTM's time in fp32 over ours in this dtype), `others` (the
cores that other programs had while the row was measured).
A row that failed has `error` in place of the times; one that timed nn.LSTM alone has only
`torch_ms`, `torch_us_per_step`, `pairs` and `calls`.

`python -m benchmarks.lstm` may add to the document: `roofline` (the rates and bandwidths that rows
are held against, where the suite asks for them) and `skipped` (rows that --minutes left no time
for).

`python -m benchmarks.memory` writes rows without times: `torch_mib`, `fused_mib` (by how much the
process grows), `memory_ratio` and `output_mib`.

`python -m benchmarks.gpu` adds to the document: `minutes`, `stages`, `build`, `micro`, `tests`,
`sanitizer`, `published` and `skipped` (gpu.py says what is in each).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

FORMAT = 1
ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = Path(__file__).parent / "results"  # by machine, in git
_SIZES = ("B", "T", "I", "H")
_OPTIONS = ("num_layers", "bidirectional", "proj_size", "shortest")
_HEADING = ("case", "dtype", "pass", "nn.LSTM ms", "fused ms", "us a step", "fused", "ratio",
            "quartiles")  # fmt: skip
_LINE = "{:<50} {:<5} {:<17}{:>11}{:>11}{:>11}{:>9}{:>8}   {}"


def significant(value: float, digits: int = 4) -> float:
    """Rounded to so many significant digits: more of a timing is noise."""
    return float(f"{value:.{digits}g}")


def preamble(report: dict[str, Any]) -> str:
    """Machine, versions, commit and threads: what stands above the table."""
    lines = []
    for name, fact in (*report["machine"].items(), *report["versions"].items()):
        if name != "backends":
            lines.append(f"{name}: {_words(fact)}")
    lines.extend(report["versions"].get("backends", ()))
    if report["environment"]:
        lines.append(f"environment: {_words(report['environment'])}")
    commit = report.get("commit", "unknown") + (" (modified)" if report.get("dirty") else "")
    lines.append(f"commit: {commit}")
    lines.append(f"threads: {report['threads']}, load before: {report['load']}")
    return "\n".join(lines)


def heading() -> str:
    return _LINE.format(*_HEADING)


def name(row: dict[str, Any]) -> str:
    """A row's case with its sizes, options and forced backend."""
    sizes = " ".join(f"{size}{row[size]}" for size in _SIZES)
    options = "".join(f" {option}={row[option]}" for option in _OPTIONS if option in row)
    backend = f" {row['backend']}" if "backend" in row else ""
    threads = f" threads={row['threads']}" if "threads" in row else ""
    return f"{row['case']} {sizes}{options}{backend}{threads}"


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    if "error" in row:
        return f"{name(row):<50} {row['dtype']:<5} {row['pass']:<17}  {row['error']}"
    first, third = row.get("ratio_quartiles", (None, None))
    last = "" if first is None else f"{first:.2f} .. {third:.2f}"
    if "gflops" in row:
        last += f", {row['gflops']:.4g} GFLOP/s, {row['roofline']:.0%} of the roofline"
    if "ratio_to_fp32" in row:
        last += f", {row['ratio_to_fp32']:.2f} x nn.LSTM in fp32"
    if row.get("others", 0) > 0.1:
        last += f", others had {row['others']:.2f} cores"
    if "memory_ratio" in row:
        last += f", memory x {row['memory_ratio']:.2f}"
    return _LINE.format(
        name(row),
        row["dtype"],
        row["pass"],
        _number(row.get("torch_ms"), ".4g"),
        _number(row.get("fused_ms"), ".4g"),
        _number(row.get("torch_ms"), ".2f", 1e3 / row["T"]),
        _number(row.get("fused_ms"), ".2f", 1e3 / row["T"]),
        _number(row.get("ratio"), ".2f"),
        last,
    )


def without_paths(text: str) -> str:
    """The same text with this machine's folders taken out: results are published."""
    folders = {str(ROOT): ".", sys.prefix: "<python>", sys.base_prefix: "<python>",
               str(Path.home()): "~"}  # fmt: skip
    for folder in sorted(folders, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(folder, folders[folder])
    return text


def to_json(report: dict[str, Any]) -> str:
    """The document, one fact and one row a line, so that a diff of two results can be read."""
    facts = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in report.items() if k != "rows"]
    rows = ",\n".join(f"  {json.dumps(row)}" for row in report["rows"])
    return "{\n" + ",\n".join(facts) + f',\n "rows": [\n{rows}\n ]\n}}\n'


def write(report: dict[str, Any], path: Path) -> None:
    """Replace `path` in one step: a run cut short leaves the last whole document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(to_json(report), encoding="utf-8")
    os.replace(part, path)


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else format(value * factor, form)


def _words(fact: Any) -> str:
    if isinstance(fact, dict):
        return ", ".join(f"{name} {value}" for name, value in fact.items())
    if isinstance(fact, list):
        return " ".join(map(str, fact))
    return str(fact)
