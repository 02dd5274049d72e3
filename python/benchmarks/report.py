"""The one format every benchmark reports in: a JSON document and the table printed from it.

{"format": 1, "benchmark", "suite", "device", "threads", "machine": {}, "versions": {},
 "environment": {}, "load", "commit", "dirty", "rows": [{}, ...]}

A row is one case, dtype and pass: the sizes B, T, I, H (and the options not at their default),
`torch_ms` and `fused_ms` (medians, milliseconds a call), `ratio` (median of the paired ratios
torch / fused: above 1 fused_lstm is the faster), `ratio_quartiles`, `pairs` and `calls` (in each
timing). A suite may add keys to its rows; none of these changes its meaning.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FORMAT = 1
_SIZES = ("B", "T", "I", "H")
_OPTIONS = ("num_layers", "bidirectional", "proj_size")
_HEADING = ("case", "dtype", "pass", "nn.LSTM ms", "fused ms", "ratio", "quartiles")
_LINE = "{:<36} {:<5} {:<17}{:>11}{:>11}{:>8}   {}"


def significant(value: float, digits: int = 4) -> float:
    """Rounded to so many significant digits: more of a timing is noise."""
    return float(f"{value:.{digits}g}")


def preamble(report: dict[str, Any]) -> str:
    """Machine, versions, commit and threads: what stands above the table."""
    lines = []
    for name, fact in (*report["machine"].items(), *report["versions"].items()):
        if name != "backends":
            lines.append(f"{name}: {_words(fact)}")
    lines.extend(report["versions"]["backends"])
    if report["environment"]:
        lines.append(f"environment: {_words(report['environment'])}")
    commit = report.get("commit", "unknown") + (" (modified)" if report.get("dirty") else "")
    lines.append(f"commit: {commit}")
    lines.append(f"threads: {report['threads']}, load before: {report['load']}")
    return "\n".join(lines)


def heading() -> str:
    return _LINE.format(*_HEADING)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    sizes = " ".join(f"{size}{row[size]}" for size in _SIZES)
    options = "".join(f" {name}={row[name]}" for name in _OPTIONS if name in row)
    first, third = row["ratio_quartiles"]
    return _LINE.format(
        f"{row['case']} {sizes}{options}",
        row["dtype"],
        row["pass"],
        f"{row['torch_ms']:.4g}",
        f"{row['fused_ms']:.4g}",
        f"{row['ratio']:.2f}",
        f"{first:.2f} .. {third:.2f}",
    )


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


def _words(fact: Any) -> str:
    if isinstance(fact, dict):
        return ", ".join(f"{name} {value}" for name, value in fact.items())
    if isinstance(fact, list):
        return " ".join(map(str, fact))
    return str(fact)
