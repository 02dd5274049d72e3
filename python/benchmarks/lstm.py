"""FusedLSTM beside nn.LSTM: same weights, same input, same process, alternating calls.

    python -m benchmarks.lstm --suite seeds --device cpu

Prints the machine, then one line per case, dtype, pass and number of threads; `--out FILE` writes
the same as JSON. Nothing is timed before both sides are seen to agree. memory.py, threads.py and
steps.py say what is measured of the suites `memory-cpu`, `threads` and `steps`.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from click import Choice, FloatRange, IntRange

from benchmarks import machine, measure, memory, report, roofline, steps
from benchmarks.measure import DTYPES
from benchmarks.report import option
from benchmarks.suites import FORWARD, FORWARD_BACKWARD, SUITES, Row, rows
from benchmarks.threads import side_by_side, verdict

HOW: dict[str, Callable[..., dict[str, Any]]] = {
    "time": measure.measured, "check": measure.checked, "memory": memory.measured,
    "threads": side_by_side, "steps": steps.measured,
}  # fmt: skip
ROW_S = 60  # a row may take on a GPU
# FlashRNN's milliseconds for the headline in bf16 on one H100 SXM, arXiv 2412.07752.
PUBLISHED = {FORWARD: 4.87, FORWARD_BACKWARD: 13.61}


@click.command()
@option("--suite", type=Choice(["gpu", *SUITES]), default="seeds")
@option("--device", type=Choice(["cpu", "cuda"]), default="cpu")
@option("--case", "names", multiple=True, help="Only this case. May be repeated.")
@option("--dtype", "dtypes", type=Choice(list(DTYPES)), multiple=True, help="Not the suite's.")
@option("--backend", "backends", multiple=True, help="Forced.  [default: the library's choice]")
@option("--threads", type=IntRange(1), help="CPU threads.  [default: the suite's, or torch's]")
@option("--repeats", type=IntRange(2), default=20, help="Pairs to time, at least.")
@option("--min-time", type=FloatRange(0), default=4.0, help="Seconds a row, at least.")
@option("--minutes", type=FloatRange(0), default=math.inf, help="Start no row after so long.")
@option("--resume", is_flag=True, help="Go on with what --out has.")
@option("--out", "path", type=click.Path(dir_okay=False, path_type=Path), help="JSON to write.")
@option("--keep", is_flag=True, help="Write JSON to benchmarks/results.")
def main(
    suite: str, device: str, names: tuple[str, ...], dtypes: tuple[str, ...], minutes: float,
    backends: tuple[str, ...], threads: int | None, path: Path | None, keep: bool, resume: bool,
    **times: Any,
) -> None:  # fmt: skip
    """Time FusedLSTM beside nn.LSTM; a ratio above 1 means that FusedLSTM is the faster."""
    if keep and (names or backends or minutes < math.inf):
        raise click.UsageError("--keep wants a whole suite: no --case, --backend, --minutes.")
    for missing, why in machine.unavailable(backends).items():
        raise click.BadParameter(f"{missing}: {why}", param_hint="--backend")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("torch sees no CUDA device.", param_hint="--device")
    if device == "cpu" and "tf32" in dtypes:
        raise click.BadParameter("tf32 exists on CUDA only.", param_hint="--dtype")
    chosen = rows(suite, backends or (None,), dtypes)
    there = dict.fromkeys(row.case.name for row in chosen)
    for name in set(names) - set(there):
        message = f"{name}: suite {suite} has {', '.join(there)}."
        raise click.BadParameter(message, param_hint="--case")
    chosen = [row for row in chosen if row.case.name in (names or there)
              and (device == "cuda" or row.dtype != "tf32")]  # fmt: skip
    if threads is not None:
        torch.set_num_threads(threads)
        chosen = list(dict.fromkeys(replace(row, threads=None) for row in chosen))

    if resume and path and path.exists():
        result = report.Report(json.loads(path.read_text()), path)
    else:
        asked = {"dtypes": dtypes} if dtypes else {}
        result = report.Report(report.document("lstm", suite, device) | asked, path)
        click.echo(report.preamble(result.document))
    found = result.document["rows"]

    def measured(row: Row) -> dict[str, Any]:
        if device == "cuda":
            # Ends this process, whatever the GPU is at.
            signal.alarm(ROW_S + math.ceil(times["min_time"]))
        facts = HOW[SUITES[row.suite].how](row, device, **times)
        if row.suite == "cpu":
            facts |= roofline.facts(row, facts["fused_ms"])
        if device == "cuda" and row.suite == "headline":
            ms = PUBLISHED[row.pass_]
            over = report.significant(ms / facts["fused_ms"])
            facts["published"] = {"FlashRNN": {"ms": ms, "over_fused": over}}
        return facts

    result.measure(chosen, measured, time.monotonic() + minutes * 60)
    ratios = [row["ratio"] for row in found if "ratio" in row]
    if ratios:
        click.echo(f"\n{sum(of < 1 for of in ratios)} of {len(ratios)} rows have a ratio below 1")
    if suite == "threads":
        short = verdict(found)
        click.echo("\n".join([f"\n{len(short)} of {len(found)} rows fall short", *short]))
    result.save(keep)


if __name__ == "__main__":
    main()
