"""FusedLSTM beside nn.LSTM: same weights, same input, same process, alternating calls.

    python -m benchmarks.lstm --suite seeds --device cpu

Prints the machine, then one line per case, dtype and pass; `--out FILE` writes the same as JSON.
Nothing is timed before both sides are seen to agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import machine, report
from benchmarks.measure import DTYPES, WrongResult, measure
from benchmarks.suites import FORWARD_GRAPH, SUITES, Row
from fused_lstm import FusedLSTM, backends


@click.command()
@click.option("--suite", type=click.Choice(list(SUITES)), default="seeds", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--case", "names", multiple=True, help="Only this case. May be repeated.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)),
              help="This dtype instead of the suite's. May be repeated.")  # fmt: skip
@click.option("--backend", help="Force this backend of fused_lstm.  [default: its own choice]")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's]")
@click.option("--repeats", type=click.IntRange(min=2), default=20, show_default=True,
              help="Pairs to time, at least.")  # fmt: skip
@click.option("--min-time", type=click.FloatRange(min=0), default=4.0, show_default=True,
              help="Seconds to go on for in each row, at least.")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here.")
@click.option("--keep", is_flag=True,
              help="Write JSON to benchmarks/results/<machine>-<suite>-<device>.json.")  # fmt: skip
def main(
    suite: str,
    device: str,
    names: tuple[str, ...],
    dtypes: tuple[str, ...],
    backend: str | None,
    threads: int | None,
    repeats: int,
    min_time: float,
    out: Path | None,
    keep: bool,
) -> None:
    """Time FusedLSTM beside nn.LSTM; a ratio above 1 means that FusedLSTM is the faster."""
    cases = [case for case in SUITES[suite].cases if not names or case.name in names]
    unknown = set(names) - {case.name for case in cases}
    if unknown:
        there = ", ".join(case.name for case in SUITES[suite].cases)
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: suite {suite} has {there}.",
                                 param_hint="--case")  # fmt: skip
    if keep and (names or dtypes or backend):
        raise click.UsageError("--keep is for a whole suite: no --case, --dtype or --backend.")
    if backend:
        check_available(backend)
    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("torch sees no CUDA device.", param_hint="--device")
    if device == "cpu" and "tf32" in dtypes:
        raise click.BadParameter("tf32 exists on CUDA only.", param_hint="--dtype")
    if threads is not None:
        torch.set_num_threads(threads)

    place = torch.device(device)
    document: dict[str, Any] = {
        "format": report.FORMAT,
        "benchmark": "lstm",
        "suite": suite,
        "device": device,
        "threads": torch.get_num_threads(),
        "machine": machine.machine(place),
        "versions": machine.versions(place),
        "environment": machine.environment(),
        "load": machine.load(),
        **machine.commit(),
        "rows": [],
    }
    click.echo(report.preamble(document))
    if (document["load"] or 0) > 0.5:
        click.echo("Other programs are running: times will be longer and vary more.", err=True)
    click.echo("\n" + report.heading())
    for case in cases:
        for dtype in dtypes or SUITES[suite].dtypes:
            for pass_ in case.passes:
                if device == "cpu" and (dtype == "tf32" or pass_ == FORWARD_GRAPH):
                    continue
                row = measured(Row(suite, case, dtype, pass_, backend), place, repeats, min_time)
                document["rows"].append(row)
                click.echo(report.line(row))
                if out:
                    report.write(document, out)
    if keep:
        name = f"{machine.machine_slug(document['machine'])}-{suite}-{device}.json"
        report.write(document, report.RESULTS / name)
        click.echo(f"kept as results/{name}")


def measured(row: Row, device: torch.device, repeats: int, min_time: float) -> dict[str, Any]:
    try:
        times = measure(row, device, repeats=repeats, min_time=min_time, fused=FusedLSTM)
    except WrongResult as error:
        raise click.ClickException(str(error)) from error
    facts = row.facts()
    del facts["suite"]  # the document's
    return {**facts, **times}


def check_available(backend: str) -> None:
    try:
        line = backends()[backend]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--backend") from error
    if not line.available:
        raise click.BadParameter(f"{backend}: {line.detail}", param_hint="--backend")


if __name__ == "__main__":
    main()
