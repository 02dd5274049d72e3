"""What streaming.py and peers.py have in common: the command, and what a row says of its sides."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
from click import Choice, FloatRange, IntRange

from benchmarks import report, steppers
from benchmarks.report import option, significant
from benchmarks.suites import Row
from benchmarks.timing import side_facts

Times = dict[tuple[str, int], list[list[float]]]  # by side and threads: seconds of each round
# Of a row: the peers, the numbers of threads, the rounds and the seconds of a turn.
Measured = Callable[[Row, tuple[str, ...], tuple[int, ...], int, float], dict[str, Any]]


def summary(times: Times, ours: str) -> dict[str, Any]:
    """What a report says of a row's times, of each side with its quicker number of threads."""
    medians = {key: [median(of) for of in found] for key, found in times.items()}
    best: dict[str, tuple[str, int]] = {}
    for key in sorted(times, key=lambda key: median(medians[key])):
        best.setdefault(key[0], key)
    facts: dict[str, Any] = {}
    for side in (ours, *(peer for peer in steppers.PEERS if peer in best)):
        of, key = medians[best[side]], best[side]
        tenths = quantiles(sum(times[key], []), n=10)
        told = {"ms": significant(median(of) * 1e3), "ms_90": significant(tenths[-1] * 1e3)}
        told["threads"] = key[1]
        facts |= side_facts("fused" if side == ours else side, told, of, medians[best[ours]])
    return facts


def command(
    suite: str, words: str, rows: list[Row], peers: tuple[str, ...], rounds: int, measured: Measured
) -> click.Command:
    """One that times these rows beside these peers; its help begins with these words."""
    cases = tuple(dict.fromkeys(row.case.name for row in rows))

    @click.command(help=words)
    @option("--case", "names", multiple=True, help="Only this case. May be repeated.")
    @option("--peer", "chosen", type=Choice(peers), multiple=True, help="Only this peer, too.")
    @option("--threads", type=IntRange(1), multiple=True, default=(1, 2), help="To choose from.")
    @option("--rounds", type=IntRange(2), default=rounds, help="Turns of each side.")
    @option("--seconds", type=FloatRange(0), default=0.1, help="Of a turn; 5 times that in bursts.")
    @option("--out", "path", type=click.Path(dir_okay=False, path_type=Path), help="JSON to write.")
    @option("--keep", is_flag=True, help="Write JSON to benchmarks/results.")
    def main(
        names: tuple[str, ...], chosen: tuple[str, ...], threads: tuple[int, ...], rounds: int,
        seconds: float, path: Path | None, keep: bool,
    ) -> None:  # fmt: skip
        for name in set(names) - set(cases):
            raise click.BadParameter(f"{name}: there are {', '.join(cases)}.", param_hint="--case")
        if keep and (names or chosen):
            raise click.UsageError("--keep wants all cases and peers: no --case, --peer.")
        result = report.Report(report.document(suite, suite, "cpu"), path)
        there = installed(result, tuple(peer for peer in peers if peer in (chosen or peers)))
        wanted = [row for row in rows if row.case.name in (names or cases)]
        began = time.monotonic()
        result.measure(wanted, lambda row: measured(row, there, threads, rounds, seconds))
        click.echo(f"\n{len(wanted)} rows in {time.monotonic() - began:.0f} s")
        result.save(keep)

    return main


def installed(result: report.Report, peers: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the peers that can be called here; prints what stands above the rows."""
    result.document["versions"] |= steppers.versions(peers)
    click.echo(report.preamble(result.document))
    lacks = {peer: steppers.missing(peer) for peer in peers}
    for peer, package in lacks.items():
        if package:
            click.echo(f"skipped: {peer}, for {package} isn't installed")
    return tuple(peer for peer in peers if not lacks[peer])
