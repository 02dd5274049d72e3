"""What is measured: a suite is a list of cases and the dtypes it is run in by default.

A new suite is a new entry of `SUITES`; nothing else has to change. `GPU` says which rows of them
`python -m benchmarks.gpu` measures, and in which order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

FORWARD = "forward"  # eval mode, no gradient wanted
FORWARD_BACKWARD = "forward+backward"  # the loss is the sum of the output
FORWARD_GRAPH = "forward, graph"  # the forward pass as one replay of a CUDA graph: no launch gaps


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
        return self._set("num_layers", "bidirectional", "proj_size")

    def facts(self) -> dict[str, Any]:
        """What a row says of its case: sizes, and all that is not at its default."""
        return {
            "case": self.name,
            "B": self.B,
            "T": self.T,
            "I": self.input_size,
            "H": self.hidden_size,
            **self._set("num_layers", "bidirectional", "proj_size", "shortest"),
        }

    def batch_sizes(self) -> list[int] | None:
        """How many sequences are still running at each step; None where all have T steps."""
        if self.shortest is None:
            return None
        fall = max(self.B - 1, 1)
        lengths = [self.T - (self.T - self.shortest) * b // fall for b in range(self.B)]
        return [sum(length > t for length in lengths) for t in range(self.T)]

    def _set(self, *names: str) -> dict[str, Any]:
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in names and getattr(self, field.name) != field.default
        }


@dataclass(frozen=True)
class Suite:
    cases: tuple[Case, ...]
    dtypes: tuple[str, ...]  # names in measure.DTYPES
    threads: tuple[int, ...] = ()  # each row with each of them; () is as many as torch takes
    roofline: bool = False  # a row says its share of what this machine could do, on a CPU


@dataclass(frozen=True)
class Row:
    """One row to measure. `backend` is forced for our side; None lets the library choose. `threads`
    None are as many as are set."""

    suite: str
    case: Case
    dtype: str
    pass_: str
    backend: str | None = None
    threads: int | None = None

    def facts(self) -> dict[str, Any]:
        """What identifies the row in a report."""
        facts = {**self.case.facts(), "suite": self.suite, "dtype": self.dtype, "pass": self.pass_}
        chosen = {"backend": self.backend, "threads": self.threads}
        return {**facts, **{name: fact for name, fact in chosen.items() if fact is not None}}


def _square(name: str, B: int, T: int, H: int, **options: Any) -> Case:
    return Case(name, B, T, H, H, **options)


# The headline: the size that FlashRNN publishes and where cuDNN has its best kernel.
_HEADLINE = _square("headline", 16, 1024, 768, passes=(FORWARD, FORWARD_BACKWARD, FORWARD_GRAPH))

# The sizes of the documents the project grew from; one step is what sampling a character costs.
_SEEDS = (
    Case("frankenstein", B=36, T=48, input_size=48, hidden_size=96),
    Case("sonnets", B=128, T=100, input_size=61, hidden_size=512),
    Case("tinyshakespeare", B=32, T=64, input_size=64, hidden_size=256),
    Case("one-step-96", B=1, T=1, input_size=48, hidden_size=96, passes=(FORWARD,)),
    Case("one-step-512", B=1, T=1, input_size=61, hidden_size=512, passes=(FORWARD,)),
)

# FlashRNN's grid with one head (H = head size): over H, over B and over T.
_FLASHRNN = tuple(
    _square(f"flashrnn-B{B}-T{T}-H{H}", B, T, H)
    for B, T, H in dict.fromkeys(
        [(16, 1024, H) for H in (768, 512, 256, 128, 64, 32, 16)]
        + [(B, 1024, H) for H in (768, 64) for B in (2, 8, 16, 32, 64, 128, 256)]
        + [(16, T, H) for H in (768, 64) for T in (256, 512, 1024, 2048)]
    )
)

# Where cuDNN has no persistent kernel: what most users run.
_HARD = (
    _square("packed", 32, 512, 512, shortest=64),
    _square("packed-equal", 16, 512, 768, shortest=512),
    _square("bidirectional", 16, 512, 512, bidirectional=True),
    _square("layers-2", 16, 512, 512, num_layers=2),
    _square("layers-4", 16, 256, 512, num_layers=4),
    _square("layers-2-both-packed", 32, 256, 256, num_layers=2, bidirectional=True, shortest=32),
    _square("batch-1", 1, 512, 512),
    _square("batch-3", 3, 512, 512),
    _square("batch-17", 17, 512, 512),
    _square("batch-33", 33, 512, 512),
    _square("hidden-1536", 16, 256, 1536),
    _square("hidden-2048", 16, 256, 2048),
    _square("projection", 16, 512, 1024, proj_size=256),
    _square("odd-sizes", 17, 512, 500),
    _square("cliff", 62, 2058, 168),  # cuDNN's path for small H at a large batch
)

# The LSTMs of DeepBench's training set but H 4096, and of its server inference set.
_DEEPBENCH = tuple(
    _square(f"deepbench-B{B}-T{T}-H{H}", B, T, H, passes=(FORWARD_BACKWARD,))
    for B, T, H in [(B, 25, H) for H in (512, 1024, 2048) for B in (16, 32, 64, 128)]
    + [(B, 50, 1536) for B in (8, 16, 32)]
    + [(B, 150, 256) for B in (16, 32, 64)]
)
_DEEPBENCH_INFERENCE = tuple(
    _square(f"deepbench-B{B}-T{T}-H{H}", B, T, H, passes=(FORWARD,))
    for T, H in ((25, 512), (25, 1024), (50, 1536), (25, 2048), (150, 256))
    for B in (1, 2, 4)
)


def _haste(batches: Iterable[int], inputs: Iterable[int]) -> tuple[Case, ...]:
    """haste's grid, T 50: batch, then hidden size, then input size."""
    return tuple(
        Case(f"haste-B{B}-I{size}-H{H}", B, 50, size, H)
        for B, H, size in product(batches, (128, 256, 512, 768, 1024, 1536, 2048), inputs)
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

_GRID = tuple(
    _square(f"grid-B32-T{T}-H{H}", 32, T, H)
    for T, H in dict.fromkeys(
        [(64, H) for H in (32, 64, 128, 256, 512, 1024)]
        + [(T, 256) for T in (1, 4, 16, 64, 256, 1024)]
    )
)

SUITES: dict[str, Suite] = {
    "headline": Suite((_HEADLINE,), ("bf16", "fp16", "fp32", "tf32")),
    "seeds": Suite(_SEEDS, ("fp32", "bf16")),
    "hard": Suite(_HARD, ("bf16", "fp32", "fp16", "tf32")),
    "flashrnn": Suite(_FLASHRNN, ("bf16", "fp16", "fp32", "tf32")),
    "deepbench": Suite(_DEEPBENCH, ("fp16", "fp32")),
    "deepbench-inference": Suite(_DEEPBENCH_INFERENCE, ("fp16", "fp32")),
    # A part of haste's grid that fits a short lease: three batches, one input size. haste is fp32.
    "haste": Suite(_haste((1, 32, 128), (256,)), ("fp32",)),
    "haste-full": Suite(_haste((1, 16, 32, 64, 128), (64, 128, 256, 512)), ("fp32",)),
    # Peak memory is in every forward+backward row on CUDA; these are the rows to look it up in.
    "memory": Suite(
        tuple(
            replace(case, name=f"memory-{case.name}", passes=(FORWARD_BACKWARD,))
            for case in (
                _HEADLINE,
                _SEEDS[1],
                _square("large", 128, 1024, 768),
                _square("deep", 32, 512, 512, num_layers=4, bidirectional=True),
                _square("packed", 64, 1024, 512, shortest=64),
            )
        ),
        ("bf16", "fp32"),
    ),
    "cpu": Suite(_CPU, ("fp32", "bf16"), threads=(1, 2), roofline=True),
    "scaling": Suite(_SCALING, ("fp32",), threads=(1, 2)),
    # Over H and over T, for the README's plot.
    "grid": Suite(_GRID, ("fp32", "bf16")),
    "memory-cpu": Suite(
        (
            *(replace(case, name=f"memory-{case.name}") for case in _CPU if case.T > 1),
            Case("memory-longer", 16, 2000, 128, 256),
        ),
        ("fp32", "bf16"),
    ),
    # Seconds on a CPU: tries the commands out, measures nothing worth keeping.
    "smoke": Suite(
        (
            Case("small", B=3, T=5, input_size=4, hidden_size=17),
            Case("packed", B=3, T=5, input_size=4, hidden_size=17, shortest=2, passes=(FORWARD,)),
        ),
        ("fp32", "bf16"),
    ),
}

# (suite, dtypes, backend), most important first: a lease that ends early cuts the end off. The
# backend None stands for the one that the command is asked to measure (cuda on a GPU).
GPU: tuple[tuple[str, tuple[str, ...], str | None], ...] = (
    ("headline", ("bf16", "fp16", "fp32", "tf32"), None),
    ("seeds", ("fp16", "bf16", "fp32", "tf32"), None),
    ("hard", ("bf16", "fp32"), None),
    ("memory", ("bf16", "fp32"), None),
    ("headline", ("bf16",), "triton"),
    ("flashrnn", ("bf16", "fp16"), None),
    ("deepbench", ("fp16",), None),
    ("deepbench-inference", ("fp16",), None),
    ("seeds", ("bf16", "fp32"), "triton"),
    ("flashrnn", ("bf16",), "triton"),
    ("hard", ("fp16", "tf32"), None),
    ("haste", ("fp32",), None),
    ("hard", ("bf16",), "triton"),
    ("flashrnn", ("fp32", "tf32"), None),
    ("deepbench", ("fp32",), None),
    ("deepbench-inference", ("fp32",), None),
)


def rows(
    suite: str, backends: tuple[str | None, ...] = (None,), dtypes: tuple[str, ...] = ()
) -> list[Row]:
    """The rows of a suite in order, those of "gpu" being `GPU`'s, for these backends of ours: the
    first stands where `GPU` has None, and rows of one that is not among them are left out. With
    `dtypes`, in those and not the suite's own. No row is there twice."""
    main, *others = backends
    if suite == "gpu":
        entries = [(name, wanted, other or main) for name, wanted, other in GPU
                   if other is None or other in backends]  # fmt: skip
    else:
        entries = [(suite, dtypes, backend) for backend in (main, *others)]
    seen: dict[tuple[Any, ...], Row] = {}
    for name, wanted, backend in entries:
        all_ = SUITES[name]
        for case in all_.cases:
            chosen = wanted or case.dtypes or all_.dtypes
            for dtype, pass_, threads in product(chosen, case.passes, all_.threads or (None,)):
                sizes = {key: fact for key, fact in case.facts().items() if key != "case"}
                same = (*sizes.items(), dtype, pass_, backend, threads)
                seen.setdefault(same, Row(name, case, dtype, pass_, backend, threads))
    return list(seen.values())
