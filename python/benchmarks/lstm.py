"""FusedLSTM beside nn.LSTM: same weights, same input, same process, alternating calls.

    python -m benchmarks.lstm --suite seeds --device cpu

Prints the machine, then one line per case, dtype, pass and number of threads; `--out FILE` writes
the same as JSON. Nothing is timed before both sides are seen to agree.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import machine, report, roofline
from benchmarks.measure import DTYPES, WrongResult, measure
from benchmarks.suites import FORWARD_GRAPH, SUITES, Row, rows
from fused_lstm import FusedLSTM, backends

DISTURBED = 0.1  # of a core


@click.command()
@click.option("--suite", type=click.Choice(list(SUITES)), default="seeds", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--case", "names", multiple=True, help="Only this case. May be repeated.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)),
              help="This dtype instead of the suite's. May be repeated.")  # fmt: skip
@click.option("--backend", help="Force this backend of fused_lstm.  [default: its own choice]")
@click.option("--threads", type=click.IntRange(min=1),
              help="CPU threads.  [default: the suite's, or torch's]")  # fmt: skip
@click.option("--repeats", type=click.IntRange(min=2), default=20, show_default=True,
              help="Pairs to time, at least.")  # fmt: skip
@click.option("--min-time", type=click.FloatRange(min=0), default=4.0, show_default=True,
              help="Seconds to go on for in each row, at least.")  # fmt: skip
@click.option("--minutes", type=click.FloatRange(min=0),
              help="Start no row after so long.  [default: no limit]")  # fmt: skip
@click.option("--patience", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="Seconds, in all, to measure disturbed rows again.")  # fmt: skip
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
    minutes: float | None,
    patience: float,
    out: Path | None,
    keep: bool,
) -> None:
    """Time FusedLSTM beside nn.LSTM; a ratio above 1 means that FusedLSTM is the faster."""
    chosen = [row for row in rows(suite, (backend,), dtypes) if not names or row.case.name in names]
    there = [case.name for case in SUITES[suite].cases]
    unknown = set(names) - set(there)
    if unknown:
        message = f"{', '.join(sorted(unknown))}: suite {suite} has {', '.join(there)}."
        raise click.BadParameter(message, param_hint="--case")
    if keep and (names or dtypes or backend or minutes is not None):
        raise click.UsageError(
            "--keep is for a whole suite: no --case, --dtype, --backend or --minutes."
        )
    if backend:
        check_available(backend)
    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("torch sees no CUDA device.", param_hint="--device")
    if device == "cpu" and "tf32" in dtypes:
        raise click.BadParameter("tf32 exists on CUDA only.", param_hint="--dtype")
    if threads is not None:
        torch.set_num_threads(threads)
        chosen = list(dict.fromkeys(replace(row, threads=None) for row in chosen))
    if device == "cpu":
        chosen = [r for r in chosen if r.dtype != "tf32" and r.pass_ != FORWARD_GRAPH]
    roofs = SUITES[suite].roofline and device == "cpu"

    place = torch.device(device)
    document = machine.document("lstm", suite, place, torch.get_num_threads())
    click.echo(report.preamble(document))
    if (document["load"] or 0) > 0.5:
        click.echo("Other programs are running: times will be longer and vary more.", err=True)
    if roofs:
        counts = sorted({row.threads or torch.get_num_threads() for row in chosen})
        kinds = list(dict.fromkeys(row.dtype for row in chosen))
        document["roofline"] = roofline.measured(kinds, counts)
        for name, found in document["roofline"].items():
            click.echo(f"{name}: {found}")
    click.echo("\n" + report.heading())
    end = None if minutes is None else time.monotonic() + minutes * 60
    for at, row in enumerate(chosen):
        if end is not None and time.monotonic() > end:
            first = report.name(row.facts())
            document["skipped"] = {"rows": len(chosen) - at, "first": first}
            click.echo(f"no time left for {len(chosen) - at} rows, from {first} on")
            break
        facts, spent = undisturbed(row, place, repeats, min_time, patience)
        patience -= spent
        if roofs:
            facts |= roofline.facts(row, facts["fused_ms"])
        if row.dtype != "fp32":
            facts |= beside_fp32(facts, document["rows"])
        document["rows"].append(facts)
        click.echo(report.line(facts))
        if out:
            report.write(document, out)
    if out:
        report.write(document, out)
    slower = [row for row in document["rows"] if row["ratio"] < 1]
    click.echo(f"\n{len(slower)} of {len(document['rows'])} rows have a ratio below 1")
    if keep:
        name = f"{machine.slug(document['machine'])}-{suite}-{device}.json"
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


def undisturbed(
    row: Row, device: torch.device, repeats: int, min_time: float, patience: float
) -> tuple[dict[str, Any], float]:
    """`measured`, again while other programs took more than DISTURBED of a core and `patience`
    lasts, and the seconds that the repetitions took. `others`: the cores they had meanwhile."""
    best: dict[str, Any] = {}
    spent = 0.0
    while True:
        start, before = time.monotonic(), machine.taken_by_others()
        facts = measured(row, device, repeats, min_time)
        seconds, after = time.monotonic() - start, machine.taken_by_others()
        if before is None or after is None:
            return facts, 0.0
        facts["others"] = max(round((after - before) / seconds, 2), 0.0)
        spent += seconds if best else 0.0
        if not best or facts["others"] < best["others"]:
            best = facts
        if best["others"] <= DISTURBED or spent >= patience:
            return best, spent
        time.sleep(min(1.0, patience - spent))
        spent += 1.0


def beside_fp32(facts: dict[str, Any], before: list[dict[str, Any]]) -> dict[str, float]:
    """nn.LSTM's time in fp32 over ours, where that row was measured before: whoever changes the
    dtype changes the library too."""
    same = ("case", "pass", "threads")
    for row in before:
        if row["dtype"] == "fp32" and all(row.get(key) == facts.get(key) for key in same):
            return {"ratio_to_fp32": report.significant(row["torch_ms"] / facts["fused_ms"])}
    return {}


def check_available(backend: str) -> None:
    try:
        line = backends()[backend]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--backend") from error
    if not line.available:
        raise click.BadParameter(f"{backend}: {line.detail}", param_hint="--backend")


if __name__ == "__main__":
    main()
