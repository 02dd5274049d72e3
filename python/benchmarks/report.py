"""The one format every benchmark reports in: a JSON document and the lines printed from it.

{"format": 1, "benchmark", "suite", "device", "threads", "machine": {}, "versions": {},
 "environment": {}, "load", "commit", "dirty", "rows": [{}, ...]}

A row is one case, dtype and pass: the sizes B, T, I, H (and the options not at their default),
`torch_ms` and `fused_ms` (medians, milliseconds a call), `torch_us_per_step` and
`fused_us_per_step` (the same over T), `ratio` (median of the paired ratios torch / fused: above 1
fused_lstm is the faster), `ratio_quartiles`, `pairs` and `calls` (in each timing). One that failed
has `error` in place of the times.

Others may be there, and none changes the meaning of these: `suite`, `backend` (the one that was
forced), `threads` (where rows differ in them), `busy` (processes beside), `distance` (the largest,
over all results, between ours and nn.LSTM's, relative to its norm), `torch_mib`, `fused_mib` and
`memory_ratio` (peak memory that one call adds to what was there before; fused / torch: below 1
fused_lstm needs less), `published` (others' figures for the same case: milliseconds, and those over
ours), `gflops` (of ours) and what roofline.py holds them against, `torch_characters_per_s` and
`fused_characters_per_s` (trained on), another peer by its name (its figures and the ratio of its
times to ours), `fused_ms_threads` (by their number), and what steps.py says of kernels, losses.py
of runs. Documents of older commits have more.

A document may add `dtypes` (those that were asked for, not the suite's own), `skipped` (rows that
there was no time for), and what gpu.py says.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import machine
from benchmarks.suites import Row

FORMAT = 1
RESULTS = Path(__file__).parent / "results"  # by machine, in git
# Settings that change how fast either side runs begin with one of these.
SETTINGS = ("FUSED_LSTM_", "ATEN_", "ONEDNN_", "OMP_", "GOMP_", "KMP_", "MKL_", "CUDA_LAUNCH_")
# What a row is told apart by.
SIZES = ("B", "T", "I", "H")
CHOSEN = "num_layers bidirectional proj_size shortest backend threads busy".split()
IDENTITY = ("case", *SIZES, *CHOSEN, "dtype", "pass")
option = partial(click.option, show_default=True)


@dataclass
class Report:
    """A document as it grows: rows are measured, printed, and the whole is written after each."""

    document: dict[str, Any]
    path: Path | None = None

    def measure(
        self, rows: list[Row], measured: Callable[[Row], dict[str, Any]], end: float = math.inf
    ) -> None:
        """Measures one row after the other, but those that are there. Where `end`, of
        time.monotonic(), comes before the last, `skipped` says what was left. A row that fails
        ends it, and has `error`, also where it takes this process along."""
        self.document.pop("skipped", None)
        there = self.document["rows"]
        rows = [row for row in rows if not any(row.facts().items() <= of.items() for of in there)]
        for at, row in enumerate(rows):
            if time.monotonic() > end:
                skipped = {"rows": len(rows) - at, "first": name(row.facts())}
                self.document["skipped"] = skipped
                click.echo(f"no time left for {skipped['rows']} rows, from {skipped['first']} on")
                break
            suite = {} if row.suite == self.document["suite"] else {"suite": row.suite}
            there.append(row.facts() | suite | {"error": "the process was lost"})
            self.save()
            try:
                there[-1] = row.facts() | suite | measured(row)
            except Exception as error:
                words = f"{type(error).__name__}: {error}".partition("\n")[0]
                there[-1]["error"] = machine.without_paths(words)[:400]
                raise click.ClickException(words) from error
            finally:
                self.save()
            click.echo(line(there[-1]))
        self.save()

    def save(self, keep: bool = False) -> None:
        """Writes it to where that was wanted; with `keep`, to where git has the results."""
        if self.path:
            write(self.document, self.path)
        if keep:
            facts = self.document
            file = f"{machine.slug(facts['machine'])}-{facts['suite']}-{facts['device']}.json"
            write(facts, RESULTS / file)
            click.echo(f"kept as results/{file}")


def document(benchmark: str, suite: str, device: str) -> dict[str, Any]:
    """A report of this process and this machine, without rows yet: report.py says what is in it."""
    return {
        "format": FORMAT,
        "benchmark": benchmark,
        "suite": suite,
        "device": device,
        "threads": torch.get_num_threads(),
        "machine": machine.machine(device),
        "versions": machine.versions(device),
        "environment": {name: machine.without_paths(value) for name, value in os.environ.items()
                        if name.startswith(SETTINGS)},
        # Processes that wanted a core in the last minute: what else the machine was doing.
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        **machine.commit(),
        "rows": [],
    }  # fmt: skip


def significant(value: float, digits: int = 4) -> float:
    """Rounded to so many significant digits: more of a timing is noise."""
    return float(f"{value:.{digits}g}")


def preamble(document: dict[str, Any]) -> str:
    """Machine, versions, commit and threads: what stands above the rows."""
    facts = document["machine"] | document["versions"]
    lines = [f"{name}: {_words(fact)}" for name, fact in facts.items() if name != "backends"]
    lines += facts.get("backends", ())
    if document["environment"]:
        lines.append(f"environment: {_words(document['environment'])}")
    modified = " (modified)" if document.get("dirty") else ""
    lines.append(f"commit: {document.get('commit', 'unknown')}{modified}")
    return "\n".join([*lines, f"threads: {document['threads']}, load before: {document['load']}"])


def name(row: dict[str, Any]) -> str:
    """A row's case with its sizes and what else was chosen."""
    sizes = " ".join(f"{size}{row[size]}" for size in SIZES)
    chosen = "".join(f" {key}={row[key]}" for key in CHOSEN if key in row)
    return f"{row['case']} {sizes}{chosen}"


def line(row: dict[str, Any]) -> str:
    """One row as it is printed: with what was measured, by the names that the document has."""
    left_out = {*IDENTITY, "pairs", "calls", "torch_us_per_step"}
    facts = [f"{key} {_words(fact):<7}" for key, fact in row.items() if key not in left_out]
    return f"{name(row):<50} {row['dtype']:<5} {row['pass']:<17}{' '.join(facts)}".rstrip()


def write(document: dict[str, Any], path: Path) -> None:
    """Replace `path` in one step: a run cut short leaves the last whole document. One fact and one
    row a line, so that a diff of two results can be read."""
    facts = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in document.items() if k != "rows"]
    rows = ",\n".join(f"  {json.dumps(row)}" for row in document["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("{\n" + ",\n".join(facts) + f',\n "rows": [\n{rows}\n ]\n}}\n', "utf-8")
    os.replace(part, path)


def _words(fact: Any) -> str:
    if isinstance(fact, dict):
        return ", ".join(f"{name} {value}" for name, value in fact.items())
    return " ".join(map(str, fact)) if isinstance(fact, list) else str(fact)
