"""FusedLSTM one step at a time, beside nn.LSTM and, where installed, ONNX Runtime and OpenVINO.

    python -m benchmarks.streaming

Each side is a process of its own for 1 and for 2 threads, of which the quicker counts; they take
turns, and a ratio is the median over the rounds of the peer's median step over ours. A row's dtype
is the width of our weights, with `weight_bytes` and `state_bytes` as told by the stream; a peer's
own is in its name. Passes: `step`, one after the other, alone or with `busy` processes beside
(`over_alone`: ours there over ours alone, in turns); `burst`, five steps every 30 ms (`ms_90`: the
90th percentile); `growth`, MiB that 100,000 steps add to the process; `character`, text drawn by
what `charlm sample` is to draw with, beside the source documents' loop, which draws one text
whatever B is.
"""

from __future__ import annotations

import functools
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
from click import Choice, FloatRange, IntRange

from benchmarks import report, steppers
from benchmarks.report import option, significant
from benchmarks.steppers import OURS, PEERS
from benchmarks.suites import Case, Row
from benchmarks.threads import busy
from benchmarks.timing import side_facts
from benchmarks.turns import Side, in_turn, sides_of

STEP, BURST, GROWTH, CHARACTER = "step", "burst", "growth", "character"
SUITE, STEPS, REST_S = "streaming", 100_000, 0.03
CASES = (
    Case("step-64", 1, 1, 64, 64, passes=(STEP,)),
    Case("step-96", 1, 1, 48, 96, passes=(STEP,)),
    Case("step-128", 1, 1, 128, 128, passes=(STEP, BURST, GROWTH)),
    Case("step-256", 1, 1, 256, 256, passes=(STEP,)),
    Case("step-512", 1, 1, 61, 512, passes=(STEP, BURST)),
    Case("step-640", 1, 1, 640, 640, num_layers=2, passes=(STEP, BURST)),
    Case("batch-3", 3, 1, 300, 300, num_layers=2, passes=(BURST,)),
    Case("batch-8", 8, 1, 512, 128, passes=(STEP,)),
    Case("batch-128", 128, 1, 256, 256, passes=(STEP,)),
    *(Case("text-96", B, 1, 48, 96, passes=(CHARACTER,)) for B in (1, 32)),
    *(Case("text-512", B, 1, steppers.VOCABULARY, 512, passes=(CHARACTER,)) for B in (1, 32)),
)  # fmt: skip
BESIDE = ("step-128", "step-512")  # two busy processes, too
Times = dict[tuple[str, int], list[list[float]]]  # by side and threads: seconds of each round


def rows() -> list[Row]:
    found = []
    for case in CASES:
        for pass_ in case.passes:
            widths = OURS if pass_ in (STEP, CHARACTER) else ("fp32",)
            found += [Row(SUITE, case, width, pass_) for width in widths]
        if case.name in BESIDE:
            found.append(Row(SUITE, case, "fp32", STEP, busy=2))
    return found


@functools.lru_cache(maxsize=1)  # the rows of a case that differ in our weights' width only
def timed(
    row: Row, peers: tuple[str, ...], threads: tuple[int, ...], rounds: int, seconds: float
) -> tuple[Times, Times, list[Side]]:
    """Alone, beside the busy processes that the row wants, and the sides that were asked."""
    ours = tuple(OURS) if row.pass_ in (STEP, CHARACTER) and not row.busy else ("fp32",)
    rest, long = (REST_S, 5 * seconds) if row.pass_ == BURST else (0.0, seconds)
    of = steppers.drawer if row.pass_ == CHARACTER else steppers.stepper
    with sides_of(functools.partial(of, case=row.case), (*peers, *ours), threads) as sides:
        alone: Times = {(side.name, side.threads): [] for side in sides}
        beside: Times = {key: [] for key in alone}
        for at in range(rounds):
            for times, others in ((alone, 0), (beside, row.busy)):
                if others is None:
                    continue
                with busy(others) if others else nullcontext():
                    for side, found in in_turn(sides, at, "timed", long, rest):
                        times[side.name, side.threads].append(found)
    return alone, beside, sides


def measured(
    row: Row, peers: tuple[str, ...], threads: tuple[int, ...], rounds: int, seconds: float
) -> dict[str, Any]:
    if row.pass_ == GROWTH:
        make = functools.partial(steppers.stepper, case=row.case)
        with sides_of(make, ("fp32",), threads[:1]) as (side,):
            return {"steps": STEPS, "fused_grown_mib": significant(side.ask("grown", STEPS))}
    if row.pass_ == CHARACTER:
        peers = tuple(of for of in peers if of == "torch")
    alone, beside, sides = timed(replace(row, dtype="fp32"), peers, threads, rounds, seconds)
    facts = summary(beside if row.busy else alone, row.dtype)
    if row.busy:
        before = summary(alone, row.dtype)
        facts["over_alone"] = significant(facts["fused_ms"] / before["fused_ms"])
    if row.pass_ == STEP:
        told = next(side.bytes for side in sides if side.name == row.dtype)
        facts |= dict(zip(("weight_bytes", "state_bytes"), told, strict=True))
    return facts


def summary(times: Times, ours: str) -> dict[str, Any]:
    """What a report says of a row's times, of each side with its quicker number of threads."""
    medians = {key: [median(of) for of in found] for key, found in times.items()}
    best: dict[str, tuple[str, int]] = {}
    for key in sorted(times, key=lambda key: median(medians[key])):
        best.setdefault(key[0], key)
    facts: dict[str, Any] = {}
    for side in (ours, *(peer for peer in PEERS if peer in best)):
        of, key = medians[best[side]], best[side]
        tenths = quantiles(sum(times[key], []), n=10)
        told = {"ms": significant(median(of) * 1e3), "ms_90": significant(tenths[-1] * 1e3)}
        told["threads"] = key[1]
        facts |= side_facts("fused" if side == ours else side, told, of, medians[best[ours]])
    return facts


@click.command()
@option("--case", "names", multiple=True, help="Only this case. May be repeated.")
@option("--peer", "peers", type=Choice(list(PEERS)), multiple=True, help="Only this peer, too.")
@option("--threads", type=IntRange(1), multiple=True, default=(1, 2), help="To choose from.")
@option("--rounds", type=IntRange(2), default=15, help="Turns of each side.")
@option("--seconds", type=FloatRange(0), default=0.1, help="Of a turn; five times that in bursts.")
@option("--out", "path", type=click.Path(dir_okay=False, path_type=Path), help="JSON to write.")
@option("--keep", is_flag=True, help="Write JSON to benchmarks/results.")
def main(
    names: tuple[str, ...], peers: tuple[str, ...], threads: tuple[int, ...], rounds: int,
    seconds: float, path: Path | None, keep: bool,
) -> None:  # fmt: skip
    """Time a step of FusedLSTM's stream beside its peers; above 1, FusedLSTM is the faster."""
    there = dict.fromkeys(case.name for case in CASES)
    for name in set(names) - set(there):
        raise click.BadParameter(f"{name}: there are {', '.join(there)}.", param_hint="--case")
    if keep and (names or peers):
        raise click.UsageError("--keep wants all cases and peers: no --case, --peer.")
    result = report.Report(report.document("streaming", SUITE, "cpu"), path)
    wanted = tuple(peer for peer in PEERS if peer in (peers or PEERS))
    result.document["versions"] |= steppers.versions(wanted)
    click.echo(report.preamble(result.document))
    for peer in wanted:
        if package := steppers.missing(peer):
            click.echo(f"skipped: {peer}, for {package} isn't installed")
    wanted = tuple(peer for peer in wanted if not steppers.missing(peer))
    began = time.monotonic()
    chosen = [row for row in rows() if row.case.name in (names or there)]
    result.measure(chosen, lambda row: measured(row, wanted, threads, rounds, seconds))
    click.echo(f"\n{len(chosen)} rows in {time.monotonic() - began:.0f} s")
    result.save(keep)


if __name__ == "__main__":
    main()
