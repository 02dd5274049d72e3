"""charlm's training, whole steps: with FusedLSTM, with nn.LSTM, and in a loop written by hand.

    python -m benchmarks.charlm

A step is the batch, the embedding or the one-hot vectors, the LSTM, dropout, the linear layer, the
loss, the backward pass, clipping and the optimiser. `fused` and `torch` are charlm's own Trainer
with `--cell fused` and `--cell lstm`; `plain` is nn.LSTM in a loop as people write it, its batches
drawn as nanoGPT's are (trainers.py). A row is a preset whose cell is an LSTM, or the default one
with 512 units and 32 rows, in a dtype and with a number of threads. Its text is random characters:
what a text says doesn't matter to the speed.

Each side is a process of its own; they take turns, and a ratio is the median over the rounds of the
peer's median step over ours. A row of which a side takes too long for an answer has `error` in
place of the times, and the next one is measured.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
from charlm.presets import preset_names, read_preset
from charlm.settings import Config
from click import Choice, FloatRange, IntRange

from benchmarks import report, trainers
from benchmarks.report import option, significant
from benchmarks.suites import Case, Row
from benchmarks.timing import side_facts
from benchmarks.turns import in_turn, sides_of

SUITE, PASS = "charlm", "training step"
SIDES = ("torch", "fused", "plain")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}  # charlm's names
THREADS, ROUNDS = (1, 2), 4
LIMIT_S = 30.0  # for an answer, of which the first has three steps and the longest a turn


def presets() -> dict[str, Config]:
    """What is trained, by name."""
    found = {name: read_preset(name)[0] for name in preset_names()}
    lstms = {name: config for name, config in found.items() if config.cell == "fused"}
    return {**lstms, "default-512": lstms["default"].override({"hidden": 512, "batch_size": 32})}


PRESETS = presets()


def rows(names: tuple[str, ...], dtypes: tuple[str, ...], threads: tuple[int, ...]) -> list[Row]:
    found = []
    for name in names:
        of = PRESETS[name]
        width = of.embedding or trainers.VOCABULARY
        case = Case(name, of.batch_size, of.window, width, of.hidden, num_layers=of.layers)
        found += [Row(SUITE, case, dtype, PASS, threads=n) for dtype in dtypes for n in threads]
    return found


def measured(row: Row, seconds: float) -> dict[str, Any]:
    config = PRESETS[row.case.name].override({"dtype": DTYPES[row.dtype]})
    make = functools.partial(trainers.stepper, config=config)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    try:
        with sides_of(make, SIDES, (row.threads or 1,), LIMIT_S) as sides:
            for at in range(ROUNDS):
                for side, found in in_turn(sides, at, "timed", seconds, 0.0, 1):
                    times[side.name].append(median(found))
    except RuntimeError as error:
        return {"error": str(error)}
    return summary(times, row.case.B * row.case.T)


def summary(times: dict[str, list[float]], characters: int) -> dict[str, Any]:
    """What a report says of each side's seconds a step, which trains so many characters."""
    facts: dict[str, Any] = {}
    for side, of in times.items():
        s = median(of)
        told = {"ms": significant(s * 1e3), "characters_per_s": round(characters / s)}
        facts |= side_facts(side, told, of, times["fused"])
    return facts


@click.command()
@option("--preset", "names", type=Choice(list(PRESETS)), multiple=True, help="Only this one.")
@option("--dtype", "dtypes", type=Choice(list(DTYPES)), multiple=True, help="Only this one.")
@option("--threads", type=IntRange(1), multiple=True, help=f"In place of {THREADS}.")
@option("--seconds", type=FloatRange(0), default=1.25, help=f"Of each of {ROUNDS} turns.")
@option("--out", "path", type=click.Path(dir_okay=False, path_type=Path), help="JSON to write.")
@option("--keep", is_flag=True, help="Write JSON to benchmarks/results.")
def main(
    names: tuple[str, ...], dtypes: tuple[str, ...], threads: tuple[int, ...], seconds: float,
    path: Path | None, keep: bool,
) -> None:  # fmt: skip
    """Time charlm's training beside nn.LSTM's; a ratio above 1 means that ours is the faster."""
    if keep and (names or dtypes or threads):
        raise click.UsageError("--keep wants all rows: no --preset, --dtype, --threads.")
    result = report.Report(report.document("charlm", SUITE, "cpu"), path)
    click.echo(report.preamble(result.document))
    chosen = rows(names or tuple(PRESETS), dtypes or tuple(DTYPES), threads or THREADS)
    began = time.monotonic()
    result.measure(chosen, lambda row: measured(row, seconds))
    click.echo(f"\n{len(chosen)} rows in {time.monotonic() - began:.0f} s")
    result.save(keep)


if __name__ == "__main__":
    main()
