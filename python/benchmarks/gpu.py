"""One command for a GPU machine: build, measure, test and check, within a time budget.

    python -m benchmarks.gpu --out DIR        # in python/ of a checkout; needs no network
    PYTHONPATH=FOLDER python -m benchmarks.gpu --installed --out DIR   # a package built elsewhere

Stages, in order: `build` installs the checkout into build/gpu-package for the visible GPU; `micro`
compiles and runs micro.cu; `headline` measures the most important rows; `tests` runs the tests
marked `gpu`, hidden sizes and the contract first, each selection in a process of its own;
`sanitizer` runs compute-sanitizer's memcheck, racecheck and synccheck over benchmarks.small_run;
`suite` measures the rest of suites.GPU, in its order, until the time is up. Each has a limit of its
own, each row too, and what fails is recorded and passed over.

DIR gets <machine>-gpu-cuda.json (report.py's format, rewritten after every row), gpu.txt (what was
printed) and a log for each stage. The document has, beyond what report.py says: `minutes` (the
budget), `stages` ({name: state, seconds}), `build`, `micro`, `tests`, `sanitizer` (stages.py),
`unavailable` (backends that were asked for and why they can't run), `published`, and `skipped`
(rows that no longer fitted).
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import machine, published, report, stages
from benchmarks.measure import measure_here, unavailable
from benchmarks.process import Failure, Worker
from benchmarks.suites import FORWARD_GRAPH, SUITES, Row, rows

# Seconds each stage may take of nine minutes; of more or less time, in proportion.
LIMITS = {"build": 240.0, "micro": 45.0, "headline": 40.0, "tests": 90.0, "sanitizer": 100.0,
          "suite": 540.0}  # fmt: skip
MINUTES = 9.0
RESERVE_S = 4.0  # of the budget, to end in
ROW_S = 60.0  # a row may take


@dataclass
class Run:
    """A run: what is asked for, and the document as far as it is known."""

    out: Path
    device: str
    minutes: float
    backends: tuple[str | None, ...]  # the main one first; None is nn.LSTM alone
    suite: str
    repeats: int
    min_time: float
    start: float = field(default_factory=time.monotonic)
    document: dict[str, Any] = field(default_factory=dict)
    measured: set[Row] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._text = (self.out / "gpu.txt").open("w", encoding="utf-8")
        self.worker = Worker(self.out / "worker.log")

    @property
    def alone(self) -> bool:
        return self.backends[0] is None

    def left(self) -> float:
        return self.start + self.minutes * 60 - RESERVE_S - time.monotonic()

    def limit(self, stage: str) -> float:
        return max(min(LIMITS[stage] * self.minutes / MINUTES, self.left()), 0.0)

    def echo(self, text: str) -> None:
        click.echo(text)
        self._text.write(text + "\n")
        self._text.flush()

    def save(self) -> None:
        slug = machine.slug(self.document["machine"])
        report.write(self.document, self.out / f"{slug}-gpu-{self.device}.json")

    def close(self) -> None:
        self.worker.close()
        self._text.close()

    def describe(self, commit: str | None) -> None:
        """The document's head; the versions follow when the library is there to ask."""
        place = torch.device(self.device)
        self.document = {
            "format": report.FORMAT,
            "benchmark": "gpu",
            "suite": self.suite,
            "device": self.device,
            "threads": torch.get_num_threads(),
            "machine": self.worker.call(machine.machine, place, limit_s=ROW_S),
            "versions": {},
            "environment": machine.environment(),
            "load": machine.load(),
            **({"commit": commit} if commit else machine.commit()),
            "minutes": self.minutes,
            "stages": {},
            "published": published.document(),
            "rows": [],
        }

    def look(self) -> None:
        """Versions, and which of the backends asked for can be measured; prints both."""
        place = torch.device(self.device)
        self.document["versions"] = self.worker.call(machine.versions, place, limit_s=ROW_S)
        asked = tuple(name for name in self.backends if name is not None)
        missing: dict[str, str] = {}
        if asked:
            missing = self.worker.call(unavailable, asked, limit_s=ROW_S)
            self.document["unavailable"] = missing
            main, *others = (None if name in missing else name for name in self.backends)
            self.backends = (main, *(name for name in others if name is not None))
        self.echo(report.preamble(self.document))
        for name, why in missing.items():
            self.echo(f"not measured: {name}: {why}")
        if self.alone:
            self.echo("nn.LSTM is measured alone.")
        self.save()

    def rows(self, suite: str, backends: tuple[str | None, ...]) -> list[Row]:
        """What is still to be measured of a suite."""
        wanted = rows(suite, backends)
        if self.device == "cpu":
            wanted = [r for r in wanted if r.dtype != "tf32" and r.pass_ != FORWARD_GRAPH]
        return [row for row in wanted if row not in self.measured]

    def measure(
        self, suite: str, backends: tuple[str | None, ...], limit_s: float
    ) -> dict[str, Any]:
        """Measures what is left of a suite for so long."""
        todo = self.rows(suite, backends)
        start = time.monotonic()
        errors = 0
        self.echo("\n" + report.heading())
        for at, row in enumerate(todo):
            left = start + limit_s - time.monotonic()
            if left < 3 * self.min_time + 1:
                more = {"rows": len(todo) - at, "first": report.name(row.facts())}
                self.document["skipped"] = more
                self.echo(f"no time left for {more['rows']} rows, from {more['first']} on")
                return {"state": "cut", "errors": errors, "rows": at}
            facts = {**row.facts(), **self._times(row, min(ROW_S, left))}
            errors += "error" in facts
            self.measured.add(row)
            self.document["rows"].append(facts)
            self.echo(report.line(facts))
            self.save()
        return {"state": "failed" if errors else "done", "errors": errors, "rows": len(todo)}

    def _times(self, row: Row, limit_s: float) -> dict[str, Any]:
        arguments = (row, self.device, self.repeats, self.min_time, row.backend is None)
        try:
            times: dict[str, Any] = self.worker.call(measure_here, *arguments, limit_s=limit_s)
        except Failure as failure:
            return {"error": report.without_paths(str(failure))}
        return times


def run_stages(run: Run, wanted: tuple[str, ...]) -> bool:
    """Runs the stages in order; whether all that ran went well."""
    well = True
    capability = run.document["machine"].get("gpu_capability")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as background:
        binary = Path(folder, "micro")
        compiled: Future[dict[str, Any]] | None = None
        if "micro" in wanted and capability:  # beside the build, which leaves cores idle at times
            compiled = background.submit(
                stages.compile_micro, binary, stages.architecture(capability),
                run.out / "micro.log", run.limit("build"),
            )  # fmt: skip
        if "build" not in wanted:
            run.look()
        for name in wanted:
            limit_s = run.limit(name)
            start = time.monotonic()
            if limit_s < 1:
                facts: dict[str, Any] = stages.skipped("no time left")
            elif name == "build":
                facts = stages.build(capability, run.out / "build.log", limit_s)
            elif name == "micro":
                facts = _micro(binary, compiled, run.out / "micro.log", limit_s)
            elif name == "tests":
                facts = _unless_alone(run) or stages.tests(run.out / "tests.log", limit_s)
            elif name == "sanitizer":
                facts = _unless_alone(run) or stages.sanitizer(run.out / "sanitizer.log", limit_s)
            elif name == "headline":
                facts = run.measure(name, run.backends[:1], limit_s)
            else:
                facts = run.measure(run.suite, run.backends, limit_s)
            seconds = round(time.monotonic() - start, 1)
            parts = [facts] if "state" in facts else list(facts.values())
            states = {part["state"] for part in parts}
            state = next((s for s in ("failed", "cut", "skipped") if s in states), "done")
            well = well and state != "failed" and not (state == "cut" and name != "suite")
            run.document["stages"][name] = {"state": state, "seconds": seconds}
            if name not in ("headline", "suite"):
                run.document[name] = facts
                _print(run, name, facts)
            run.echo(f"[{name}: {state} after {seconds} s, {run.left():.0f} s left]")
            run.save()
            if name == "build":
                run.worker.close()  # the next one sees what was installed
                if state != "done":  # whatever else Python may find is not this checkout
                    run.document["unavailable"] = dict.fromkeys(
                        filter(None, run.backends), "the build failed"
                    )
                    run.backends = (None,)
                run.look()
    if any(row.get("published") for row in run.document["rows"]):
        run.echo("\npublished by others, on an H100 SXM, and that over the times above")
        run.echo("\n".join(published.lines(run.document["rows"])))
    return well


def _unless_alone(run: Run) -> dict[str, Any] | None:
    return stages.skipped("nn.LSTM is measured alone") if run.alone else None


def _micro(
    binary: Path, compiled: Future[dict[str, Any]] | None, log: Path, limit_s: float
) -> dict[str, Any]:
    if compiled is None:
        return stages.skipped("no GPU")
    facts = compiled.result()
    return stages.micro(binary, log, limit_s) if facts["state"] == "done" else facts


def _print(run: Run, name: str, facts: dict[str, Any]) -> None:
    """A stage's facts, one a line."""
    run.echo(f"\n{name}")
    for key, fact in (facts.get("measured") or facts).items():
        if isinstance(fact, dict) and "value" in fact:
            more = {k: v for k, v in fact.items() if k not in ("value", "unit")}
            words = f"{fact['value']} {fact['unit']}" + (f"  {more}" if more else "")
        else:
            words = "\n    ".join(fact) if isinstance(fact, list) else str(fact)
        run.echo(f"  {key}: {words}")


@click.command()
@click.option("--out", required=True, type=click.Path(file_okay=False, path_type=Path),
              help="Folder for the results, at most 8 files.")  # fmt: skip
@click.option("--minutes", type=click.FloatRange(min=0.01), default=MINUTES, show_default=True,
              help="To be done in.")  # fmt: skip
@click.option("--stage", "wanted", multiple=True, type=click.Choice(stages.STAGES),
              help="Only this stage. May be repeated.")  # fmt: skip
@click.option("--installed", is_flag=True,
              help="Measure the fused_lstm that Python imports; build none.")  # fmt: skip
@click.option("--peers-only", is_flag=True, help="Measure nn.LSTM alone; nothing is built.")
@click.option("--backend", "backends", multiple=True,
              help="Of ours, the main one first.  [default: cuda, triton]")  # fmt: skip
@click.option("--suite", type=click.Choice(["gpu", *SUITES]),
              help="Of the last stage.  [default: gpu; on a CPU: smoke]")  # fmt: skip
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True,
              help="cpu: a dry run of this command.")  # fmt: skip
@click.option("--repeats", type=click.IntRange(min=2), default=2, show_default=True,
              help="Pairs to time in each row, at least.")  # fmt: skip
@click.option("--min-time", type=click.FloatRange(min=0), default=0.15, show_default=True,
              help="Seconds to go on for in each row, at least.")  # fmt: skip
@click.option("--commit", help="The checkout's commit, where there is no git to ask.")
def main(
    out: Path,
    minutes: float,
    wanted: tuple[str, ...],
    installed: bool,
    peers_only: bool,
    backends: tuple[str, ...],
    suite: str | None,
    device: str,
    repeats: int,
    min_time: float,
    commit: str | None,
) -> None:
    """Build, measure, test and check fused_lstm on this GPU machine."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            f"torch {torch.__version__} sees no NVIDIA GPU on this machine, and this command "
            "measures on one (--device cpu is a dry run)."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    ours = backends or (("cuda", "triton") if device == "cuda" else ("cpu",))
    run = Run(
        out=out,
        device=device,
        minutes=minutes,
        backends=(None,) if peers_only else ours,
        suite=suite or ("gpu" if device == "cuda" else "smoke"),
        repeats=repeats,
        min_time=min_time,
    )
    order = tuple(name for name in stages.STAGES if name in (wanted or stages.STAGES))
    if installed or peers_only:
        order = tuple(name for name in order if name != "build")
    if device == "cpu" and not wanted:
        order = tuple(name for name in order if name != "headline")  # a minute on a CPU
    try:
        run.describe(commit)
        well = run_stages(run, order)
        run.save()
    except Failure as failure:
        raise click.ClickException(str(failure)) from failure
    finally:
        run.close()
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
