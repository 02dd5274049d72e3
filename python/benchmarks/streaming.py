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
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from benchmarks import steppers
from benchmarks.beside import Times, command, summary
from benchmarks.report import significant
from benchmarks.steppers import OURS
from benchmarks.suites import Case, Row
from benchmarks.threads import busy
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


main = command(
    SUITE,
    "Time a step of FusedLSTM's stream beside its peers; above 1, FusedLSTM is the faster.",
    rows(), steppers.PEERS, 15, measured,
)  # fmt: skip


if __name__ == "__main__":
    main()
