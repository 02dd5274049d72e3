"""Peak memory of a call on a CPU, each side in fresh processes: by how much the process grows.

    python -m benchmarks.memory

A process makes the LSTM and its input, runs the smallest case once so that libraries and threads
are there, and then the case once. What it grew by at its peak, beyond what was resident before, is
the call's: results, gradients, what is saved for the backward pass and workspaces. The last rows
run 600 lengths one after the other, by how much the process grows meanwhile. Linux only.
"""

from __future__ import annotations

import re
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from benchmarks import machine, report
from benchmarks.measure import DTYPES, inputs, timed
from benchmarks.process import Failure, Worker
from benchmarks.suites import FORWARD, FORWARD_BACKWARD, SUITES, Case, Row, rows

SIDES = ("torch", "fused")
LENGTHS = 600
FLAT = Case("lengths-1-to-600", 16, LENGTHS, 16, 128, passes=(FORWARD, FORWARD_BACKWARD))
TINY = Case("tiny", 2, 3, 4, 8)
LIMIT_S = 120.0


def grown_mib(side: str, row: Row, threads: int) -> float:
    """MiB by which this process, a fresh one, grows at its peak in one call of the row, or with
    the case FLAT over all of its lengths."""
    torch.set_num_threads(threads)
    with torch.set_grad_enabled(row.pass_ == FORWARD_BACKWARD):
        calls(side, row, TINY)[0]()
        case = calls(side, row, row.case)
        if row.case == FLAT:
            for _ in range(3):
                case[-1]()
        before = reset_peak()
        for call in case:
            call()
    return report.significant(max(peak_kib() - before, 0) / 1024)


def calls(side: str, row: Row, case: Case) -> list[Any]:
    """What is run: the row's pass of the case; of FLAT one for each length."""
    from fused_lstm import FusedLSTM

    training = row.pass_ == FORWARD_BACKWARD
    place: dict[str, Any] = {"dtype": DTYPES[row.dtype].dtype}
    make: Any = nn.LSTM if side == "torch" else FusedLSTM
    torch.manual_seed(0)
    lstm = make(case.input_size, case.hidden_size, **case.options(), **place).train(training)
    x, hx = inputs(case, training, place)
    if case != FLAT:
        return [timed(lstm, x, hx, row.pass_)]
    lengths = range(1, LENGTHS + 1)
    return [timed(lstm, x.detach()[:n].requires_grad_(training), hx, row.pass_) for n in lengths]


def reset_peak() -> float:
    """KiB that are resident now, from which on the peak is counted."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not allowed: the peak so far hides as much of the growth
        return peak_kib()
    return status_kib("VmRSS")


def peak_kib() -> float:
    return status_kib("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def status_kib(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def output_mib(row: Row) -> float:
    """What the call returns whatever it does, without the states."""
    case = row.case
    batch_sizes = case.batch_sizes()
    N = case.T * case.B if batch_sizes is None else sum(batch_sizes)
    width = (case.proj_size or case.hidden_size) * (2 if case.bidirectional else 1)
    return report.significant(N * width * DTYPES[row.dtype].dtype.itemsize / 2**20)


def measured(row: Row, threads: int, log: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"output_mib": output_mib(row)}
    for side in SIDES:
        worker = Worker(log)
        try:
            facts[f"{side}_mib"] = worker.call(grown_mib, side, row, threads, limit_s=LIMIT_S)
        except Failure as failure:
            return {"error": report.without_paths(f"{side}: {failure}")}
        finally:
            worker.close()
    facts["memory_ratio"] = report.significant(facts["fused_mib"] / max(facts["torch_mib"], 1 / 64))
    return facts


def line(row: dict[str, Any]) -> str:
    head = f"{report.name(row):<55} {row['dtype']:<5} {row['pass']:<17}"
    if "error" in row:
        return f"{head} {row['error']}"
    sizes = "".join(f"{row[f'{key}_mib']:>11.4g}" for key in (*SIDES, "output"))
    return f"{head}{sizes}{row['memory_ratio']:>8.2f}"


@click.command()
@click.option("--suite", type=click.Choice(list(SUITES)), default="memory-cpu", show_default=True)
@click.option("--case", "names", multiple=True, help="Only this case. May be repeated.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's]")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here.")
@click.option("--keep", is_flag=True, help="Write JSON to benchmarks/results.")
def main(
    suite: str, names: tuple[str, ...], threads: int | None, out: Path | None, keep: bool
) -> None:
    """Peak memory of FusedLSTM beside nn.LSTM on a CPU; a ratio below 1 means that FusedLSTM
    needs less."""
    if not sys.platform.startswith("linux"):
        raise click.ClickException("this command reads /proc, which only Linux has.")
    flat = [Row(suite, FLAT, "fp32", pass_) for pass_ in FLAT.passes]
    chosen = [row for row in [*rows(suite), *flat] if not names or row.case.name in names]
    if not chosen:
        raise click.BadParameter(f"none of these is in suite {suite}.", param_hint="--case")
    if keep and names:
        raise click.UsageError("--keep is for a whole suite: no --case.")
    place, count = torch.device("cpu"), threads or torch.get_num_threads()
    document = machine.document("memory", suite, place, count)
    click.echo(report.preamble(document))
    heads = "".join(f"{head:>11}" for head in ("nn.LSTM MiB", "fused MiB", "output MiB"))
    click.echo(f"\n{'case':<55} dtype {'pass':<17}{heads}   ratio")
    with tempfile.TemporaryDirectory() as folder:
        for row in chosen:
            facts = {**row.facts(), **measured(row, count, Path(folder, "log"))}
            del facts["suite"]  # the document's
            document["rows"].append(facts)
            click.echo(line(facts))
            if out:
                report.write(document, out)
    if keep:
        path = report.RESULTS / f"{machine.slug(document['machine'])}-{suite}-cpu.json"
        report.write(document, path)
        click.echo(f"kept as results/{path.name}")


if __name__ == "__main__":
    main()
