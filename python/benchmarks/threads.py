"""Any number of threads, beside busy processes, and in bursts after a rest: the settings that users
have without knowing, where a barrier that spins costs a time slice.

    python -m benchmarks.threads

Each side of a row is measured in a process of its own, for the threads that one leaves behind would
be in the other's way, while `busy` other processes count as fast as they can. A burst is five
calls, then 30 ms of sleep, as a server, an agent or a microphone has them; `torch_us` and
`fused_us` are the median, the 90th percentile and the largest of all calls, in microseconds.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import click
import torch
from torch import nn

from benchmarks import machine, report
from benchmarks.measure import inputs, timed
from benchmarks.process import Failure, Worker
from benchmarks.suites import FORWARD, FORWARD_BACKWARD, Case, Row
from benchmarks.timing import cpu_clock, time_alone

THREADS = (1, 2, 4, 8, 16, 64)
BUSY = (0, 1, 2)
CASES = (
    Case("long-sequence", 1, 300, 128, 128, passes=(FORWARD,)),
    Case("step", 1, 1, 65, 512, passes=(FORWARD,)),
    Case("small", 36, 48, 48, 96, passes=(FORWARD_BACKWARD,)),
    Case("medium", 64, 64, 256, 256, passes=(FORWARD_BACKWARD,)),
)
BURST = "burst of five"
BURSTS = tuple(
    Case(name, B, 1, H, H, num_layers=layers, passes=(BURST,))
    for name, B, H, layers in (
        ("step", 1, 128, 1),
        ("step", 1, 256, 1),
        ("step", 3, 300, 2),
        ("step", 1, 512, 1),
        ("step", 1, 640, 2),
    )
)
BURST_THREADS = (1, 2)
CALLS, REST_S = 5, 0.03
SECONDS, BURST_SECONDS = 2.0, 5.0
LIMIT_S = 180.0


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many other processes that never rest."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def call_of(side: str, row: Row) -> Callable[[], object]:
    from fused_lstm import FusedLSTM

    assert row.threads
    torch.set_num_threads(row.threads)
    case, training = row.case, row.pass_ == FORWARD_BACKWARD
    torch.set_grad_enabled(training)
    torch.manual_seed(0)
    make = nn.LSTM if side == "torch" else FusedLSTM
    lstm = make(case.input_size, case.hidden_size, **case.options()).train(training)
    return timed(lstm, *inputs(case, training, {}), FORWARD_BACKWARD if training else FORWARD)


def times(side: str, row: Row) -> float:
    """Milliseconds a call, the median."""
    ms, _, _ = time_alone(call_of(side, row), cpu_clock, repeats=5, min_time=SECONDS)
    return report.significant(ms)


def bursts(side: str, row: Row) -> list[float]:
    """Median, 90th percentile and largest of the calls, in microseconds."""
    call, taken = call_of(side, row), []
    end = time.monotonic() + BURST_SECONDS
    while time.monotonic() < end:
        time.sleep(REST_S)
        for _ in range(CALLS):
            start = time.perf_counter_ns()
            call()
            taken.append((time.perf_counter_ns() - start) * 1e-3)
    del taken[: 2 * CALLS]  # the first two bursts warm up
    tenths = quantiles(taken, n=10)
    return [report.significant(us) for us in (median(taken), tenths[-1], max(taken))]


def chosen_rows(cases: tuple[str, ...]) -> list[tuple[Row, int]]:
    """Each row with the number of busy processes beside it."""
    rows = [
        (Row("threads", case, "fp32", case.passes[0], threads=threads), count)
        for case in CASES
        for count in BUSY
        for threads in THREADS
    ]
    rows += [
        (Row("threads", case, "fp32", BURST, threads=threads), 0)
        for case in BURSTS
        for threads in BURST_THREADS
    ]
    return [(row, count) for row, count in rows if not cases or row.case.name in cases]


def measured(row: Row, count: int, log: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    in_bursts = row.pass_ == BURST
    for side in ("torch", "fused"):
        worker = Worker(log)
        try:
            with busy(count):
                found = worker.call(bursts if in_bursts else times, side, row, limit_s=LIMIT_S)
        except Failure as failure:
            return {"error": report.without_paths(f"{side}: {failure}")}
        finally:
            worker.close()
        facts[f"{side}_us" if in_bursts else f"{side}_ms"] = found
    if not in_bursts:
        facts["ratio"] = report.significant(facts["torch_ms"] / facts["fused_ms"])
    return facts


def line(row: dict[str, Any]) -> str:
    head = f"{report.name(row):<46} busy {row['busy']} {row['pass']:<17}"
    if "error" in row:
        return f"{head} {row['error']}"
    if "fused_us" in row:
        theirs, ours = (
            " ".join(f"{us:>7.0f}" for us in row[f"{side}_us"]) for side in ("torch", "fused")
        )
        return f"{head} nn.LSTM {theirs}   FusedLSTM {ours} us"
    return f"{head} nn.LSTM {row['torch_ms']:>8.3g} ms   FusedLSTM {row['fused_ms']:>8.3g} ms"


def verdict(rows: list[dict[str, Any]]) -> list[str]:
    """What falls short: an entry of several threads over 1.5 times our own time with 2, beside as
    many busy processes, one slower than nn.LSTM or that has failed, a burst whose 90th percentile
    is over 3 medians."""
    short = []
    two = {
        (r["case"], r["busy"]): r["fused_ms"] for r in rows if r["threads"] == 2 and "ratio" in r
    }
    for row in rows:
        if "error" in row:
            short.append(line(row))
        elif "fused_us" in row:
            middle, tenth, _ = row["fused_us"]
            if tenth > 3 * middle:
                short.append(f"{line(row)}: {tenth / middle:.1f} medians")
        elif "ratio" in row:
            times = row["fused_ms"] / two.get((row["case"], row["busy"]), row["fused_ms"])
            if (row["threads"] > 1 and times > 1.5) or row["ratio"] < 1:
                short.append(f"{line(row)}: {times:.2f} x 2 threads, ratio {row['ratio']:.2f}")
    return short


@click.command()
@click.option("--case", "names", multiple=True, help="Only this case. May be repeated.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here.")
@click.option("--keep", is_flag=True, help="Write JSON to benchmarks/results.")
def main(names: tuple[str, ...], out: Path | None, keep: bool) -> None:
    """FusedLSTM beside nn.LSTM with too many threads, busy neighbours, and after rests."""
    document = machine.document("threads", "threads", torch.device("cpu"), torch.get_num_threads())
    click.echo(report.preamble(document))
    with tempfile.TemporaryDirectory() as folder:
        for row, count in chosen_rows(names):
            facts = row.facts() | {"busy": count} | measured(row, count, Path(folder, "log"))
            del facts["suite"]  # the document's
            document["rows"].append(facts)
            click.echo(line(facts))
            if out:
                report.write(document, out)
    short = verdict(document["rows"])
    click.echo("\n".join([f"\n{len(short)} of {len(document['rows'])} rows fall short", *short]))
    if keep:
        path = report.RESULTS / f"{machine.slug(document['machine'])}-threads-cpu.json"
        report.write(document, path)
        click.echo(f"kept as results/{path.name}")


if __name__ == "__main__":
    main()
