"""What is measured: a suite is a list of cases and the dtypes it is run in by default.

A new suite is a new entry of `SUITES`; nothing else has to change. `GPU` says which rows of them
`python -m benchmarks.gpu` measures, and in which order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

FORWARD = "forward"  # eval mode, no gradient wanted
FORWARD_BACKWARD = "forward+backward"  # the loss is the sum of the output


@dataclass(frozen=True)
class Case:
    """One LSTM and one input of shape (T, B, input_size), with the states (h_0, c_0) given.

    With `shortest` the input is a PackedSequence: the lengths fall evenly from T to `shortest`.
    """

    name: str
    B: int  # sequences in a batch
    T: int  # steps
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    shortest: int | None = None
    passes: tuple[str, ...] = (FORWARD, FORWARD_BACKWARD)
    dtypes: tuple[str, ...] = ()  # in place of the suite's

    def options(self) -> dict[str, Any]:
        """The arguments of nn.LSTM, beyond the two sizes, that are not at their default."""
        names = ("num_layers", "bidirectional", "proj_size")
        return {n: getattr(self, n) for n in names if getattr(self, n) != getattr(Case, n)}

    def facts(self) -> dict[str, Any]:
        """What a row says of its case: sizes, and all that is not at its default."""
        sizes = {"B": self.B, "T": self.T, "I": self.input_size, "H": self.hidden_size}
        packed = {} if self.shortest is None else {"shortest": self.shortest}
        return {"case": self.name, **sizes, **self.options(), **packed}

    @property
    def N(self) -> int:
        """Steps of all sequences."""
        return sum(self.batch_sizes() or [self.B * self.T])

    @property
    def width(self) -> int:
        """Of the output."""
        return (self.proj_size or self.hidden_size) * (2 if self.bidirectional else 1)

    def batch_sizes(self) -> list[int] | None:
        """How many sequences are still running at each step; None where all have T steps."""
        if self.shortest is None:
            return None
        fall = max(self.B - 1, 1)
        lengths = [self.T - (self.T - self.shortest) * b // fall for b in range(self.B)]
        return [sum(length > t for length in lengths) for t in range(self.T)]


@dataclass(frozen=True)
class Suite:
    cases: tuple[Case, ...]
    dtypes: tuple[str, ...]  # names in measure.DTYPES
    threads: tuple[int | None, ...] = (None,)  # each row with each of them; None: torch's number
    busy: tuple[int | None, ...] = (None,)  # and of these
    how: str = "time"  # is measured: a key of lstm.HOW


@dataclass(frozen=True)
class Row:
    """One row to measure. `backend` is forced for our side; None lets the library choose. `threads`
    None are as many as are set; `busy` is how many other processes are kept so."""

    suite: str
    case: Case
    dtype: str
    pass_: str
    backend: str | None = None
    threads: int | None = None
    busy: int | None = None

    def facts(self) -> dict[str, Any]:
        """What identifies the row in a report."""
        facts = {**self.case.facts(), "dtype": self.dtype, "pass": self.pass_}
        chosen = {"backend": self.backend, "threads": self.threads, "busy": self.busy}
        return facts | {name: fact for name, fact in chosen.items() if fact is not None}


def _square(name: str, B: int, T: int, H: int, **options: Any) -> Case:
    return Case(name, B, T, H, H, **options)


def _squares(name: str, *sizes: tuple[int, int, int]) -> tuple[Case, ...]:
    each = dict.fromkeys(sizes)
    return tuple(_square(f"{name}-B{B}-T{T}-H{H}", B, T, H) for B, T, H in each)


# The headline: the size that FlashRNN publishes and where cuDNN has its best kernel.
_HEADLINE = _square("headline", 16, 1024, 768)

# The sizes of the documents the project grew from; one step is what sampling a character costs.
_SEEDS = (
    Case("frankenstein", B=36, T=48, input_size=48, hidden_size=96),
    Case("sonnets", B=128, T=100, input_size=61, hidden_size=512),
    Case("tinyshakespeare", B=32, T=64, input_size=64, hidden_size=256),
    Case("one-step-96", B=1, T=1, input_size=48, hidden_size=96, passes=(FORWARD,)),
    Case("one-step-512", B=1, T=1, input_size=61, hidden_size=512, passes=(FORWARD,)),
)

# FlashRNN's grid with one head (H = head size): over H, over B and over T.
_FLASHRNN = _squares(
    "flashrnn",
    *((16, 1024, H) for H in (768, 512, 256, 128, 64, 32, 16)),
    *((B, 1024, H) for H in (768, 64) for B in (2, 8, 16, 32, 64, 128, 256)),
    *((16, T, H) for H in (768, 64) for T in (256, 512, 1024, 2048)),
)

# Where cuDNN has no persistent kernel: what most users run.
_HARD = (
    _square("packed", 32, 512, 512, shortest=64),
    _square("packed-equal", 16, 512, 768, shortest=512),
    _square("bidirectional", 16, 512, 512, bidirectional=True),
    _square("layers-2", 16, 512, 512, num_layers=2),
    _square("layers-4", 16, 256, 512, num_layers=4),
    _square("layers-2-both-packed", 32, 256, 256, num_layers=2, bidirectional=True, shortest=32),
    *(_square(f"batch-{B}", B, 512, 512) for B in (1, 3, 17, 33)),
    *(_square(f"hidden-{H}", 16, 256, H) for H in (1536, 2048)),
    _square("projection", 16, 512, 1024, proj_size=256),
    _square("odd-sizes", 17, 512, 500),
    _square("cliff", 62, 2058, 168),  # cuDNN's path for small H at a large batch
)

# The LSTMs of DeepBench's training set but H 4096, and of its server inference set.
_DEEPBENCH = tuple(
    _square(f"deepbench-B{B}-T{T}-H{H}", B, T, H, passes=(pass_,))
    for pass_, batches, sizes in (
        (FORWARD_BACKWARD, (16, 32, 64, 128), ((25, 512), (25, 1024), (25, 2048))),
        (FORWARD_BACKWARD, (8, 16, 32), ((50, 1536),)),
        (FORWARD_BACKWARD, (16, 32, 64), ((150, 256),)),
        (FORWARD, (1, 2, 4), ((25, 512), (25, 1024), (50, 1536), (25, 2048), (150, 256))),
    )
    for (T, H), B in product(sizes, batches)
)

# haste's grid, T 50: batch, then hidden size, then input size.
_HASTE = tuple(
    Case(f"haste-B{B}-I{size}-H{H}", B, 50, size, H)
    for B, H, size in product(
        (1, 16, 32, 64, 128), (128, 256, 512, 768, 1024, 1536, 2048), (64, 128, 256, 512)
    )
)

# Where a CPU kernel is asked for: large and small products, long and short sequences, what oneDNN
# leaves to torch's own steps, one step, and two directions.
_CPU = (
    Case("large-batch", 128, 100, 65, 512),
    Case("small", 36, 48, 48, 96),
    Case("layers-2", 64, 64, 256, 256, num_layers=2),
    Case("long", 8, 1000, 128, 128),
    Case("large-hidden", 20, 70, 400, 1150),
    Case("packed", 64, 64, 256, 256, shortest=8),
    Case("projection", 64, 64, 256, 256, proj_size=128),
    Case("fp64", 64, 64, 256, 256, dtypes=("fp64",)),
    Case("one-step-96", 1, 1, 48, 96),
    Case("one-step-512", 1, 1, 65, 512),
    Case("bidirectional", 64, 64, 256, 256, bidirectional=True),
)

# One size grows a decade or two octaves at a time, the others are small: what doesn't grow with it
# shows at the left end, and the right end is a straight line on logarithmic axes.
_SCALING = (
    *(Case(f"T-{10**n}", 1, 10**n, 16, 32) for n in range(6)),
    *(Case(f"B-{4**n}", 4**n, 16, 64, 128) for n in range(6)),
    *(Case(f"H-{4**n}", 4, 4, 64, 4**n) for n in range(7)),
)

_GRID = _squares(
    "grid",
    *((32, 64, H) for H in (32, 64, 128, 256, 512, 1024)),
    *((32, T, 256) for T in (1, 4, 16, 64, 256, 1024)),
)

# Peak memory is in every forward+backward row on CUDA; these are more to look it up in.
_MEMORY = (
    _square("large", 128, 1024, 768, passes=(FORWARD_BACKWARD,)),
    _square("deep", 32, 512, 512, num_layers=4, bidirectional=True, passes=(FORWARD_BACKWARD,)),
    _square("packed", 64, 1024, 512, shortest=64, passes=(FORWARD_BACKWARD,)),
)
LENGTHS = Case("lengths-1-to-600", 16, 600, 16, 128, dtypes=("fp32",))  # one after the other
_MEMORY_CPU = (*(case for case in _CPU if case.T > 1), Case("longer", 16, 2000, 128, 256), LENGTHS)

_THREADS = (
    Case("long-sequence", 1, 300, 128, 128, passes=(FORWARD,)),
    Case("step", 1, 1, 65, 512, passes=(FORWARD,)),
    Case("small", 36, 48, 48, 96, passes=(FORWARD_BACKWARD,)),
    Case("medium", 64, 64, 256, 256, passes=(FORWARD_BACKWARD,)),
)

_STEPS = tuple(
    _square("step", B, T, H, passes=(FORWARD_BACKWARD,))
    for H, B, T in (
        (16, 16, 256), (64, 16, 256), (64, 256, 64), (96, 16, 256), (256, 32, 128), (512, 1, 256),
        (512, 16, 256), (512, 128, 100), (768, 16, 1024), (768, 64, 128), (1024, 16, 256),
        (2048, 16, 128),
    )
)  # fmt: skip

# Sizes that divide by nothing, for a checker; and seconds on a CPU, to try the commands out.
_ODD = (
    Case("odd", 3, 5, 7, 17),
    Case("wide", 17, 3, 33, 129),
    Case("all options", 3, 5, 7, 33, num_layers=2, bidirectional=True, proj_size=9, shortest=2),
)
_SMOKE = (
    Case("small", 3, 5, 4, 17),
    Case("packed", 3, 5, 4, 17, shortest=2, passes=(FORWARD,)),
)

ALL = ("fp16", "bf16", "tf32", "fp32")
SUITES: dict[str, Suite] = {
    "headline": Suite((_HEADLINE,), ("bf16", "fp16", "fp32", "tf32")),
    "seeds": Suite(_SEEDS, ("fp32", "bf16")),
    "hard": Suite(_HARD, ALL),
    "flashrnn": Suite(_FLASHRNN, ALL),
    "deepbench": Suite(_DEEPBENCH, ("fp16", "fp32")),
    "haste": Suite(_HASTE, ("fp32",)),
    "memory": Suite(_MEMORY, ("bf16", "fp32")),
    "cpu": Suite(_CPU, ("fp32", "bf16"), threads=(1, 2)),
    "scaling": Suite(_SCALING, ("fp32",), threads=(1, 2)),
    "grid": Suite(_GRID, ("fp32", "bf16")),
    "memory-cpu": Suite(_MEMORY_CPU, ("fp32", "bf16"), how="memory"),
    "threads": Suite(_THREADS, ("fp32",), (1, 2, 4, 8, 16, 64), (0, 1, 2), how="threads"),
    "steps": Suite(_STEPS, ALL, how="steps"),
    "odd": Suite(_ODD, (*ALL, "fp64"), how="check"),
    "smoke": Suite(_SMOKE, ("fp32", "bf16")),
}

# (suite, dtypes, backend), most important first: a lease that ends early cuts the end off. The
# backend None stands for the one that the command is asked to measure (cuda on a GPU).
GPU: tuple[tuple[str, str, str | None], ...] = (
    ("headline", "bf16 fp16 fp32 tf32", None),
    ("seeds", "fp16 bf16 fp32 tf32", None),
    ("hard", "bf16 fp32", None),
    ("memory", "bf16 fp32", None),
    ("headline", "bf16", "triton"),
    ("flashrnn", "bf16 fp16", None),
    ("deepbench", "fp16", None),
    ("seeds", "bf16 fp32", "triton"),
    ("flashrnn", "bf16", "triton"),
    ("hard", "fp16 tf32", None),
    ("hard", "bf16", "triton"),
    ("flashrnn", "fp32 tf32", None),
    ("deepbench", "fp32", None),
    ("haste", "fp32", None),
)


def rows(
    suite: str, backends: tuple[str | None, ...] = (None,), dtypes: tuple[str, ...] = ()
) -> list[Row]:
    """The rows of a suite in order, those of "gpu" being `GPU`'s, for these backends of ours: the
    first stands where `GPU` has None, and rows of one that is not among them are left out. With
    `dtypes`, in those and not the suite's own. No row is there twice."""
    entries: list[tuple[str, Sequence[str], str | None]]
    entries = [(suite, dtypes, backend) for backend in backends]
    if suite == "gpu":
        there = [entry for entry in GPU if entry[2] in (None, *backends)]
        entries = [(name, wanted.split(), other or backends[0]) for name, wanted, other in there]
    seen: dict[Row, Row] = {}
    for name, wanted, backend in entries:
        of = SUITES[name]
        for case in of.cases:
            chosen = wanted or case.dtypes or of.dtypes
            for facts in product(chosen, case.passes, (backend,), of.threads, of.busy):
                row = Row(name, case, *facts)
                same = replace(case, name="", passes=(), dtypes=())
                seen.setdefault(replace(row, suite="", case=same), row)
    return list(seen.values())
