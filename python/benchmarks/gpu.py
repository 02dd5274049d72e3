"""One command for a GPU machine: build, measure, test and check, within a time budget.

    python -m benchmarks.gpu --out DIR        # in python/ of a checkout; needs no network
    PYTHONPATH=FOLDER python -m benchmarks.gpu --installed --out DIR   # a package built elsewhere
    python -m benchmarks.gpu --device cpu --backend cpu --suite smoke --stage suite ...  # dry run

Stages, in order: `build` installs the checkout into build/gpu-package for the visible GPU; `micro`
compiles and runs micro.cu; `headline` measures the most important rows; `tests` runs the tests
marked `gpu`, hidden sizes and the contract first, each selection in a process of its own;
`sanitizer` runs compute-sanitizer's memcheck, racecheck and synccheck over the suite `odd`;
`suite` measures the rest of suites.GPU, in its order, until the time is up. Each has a limit of its
own, each row too, and what fails is recorded and passed over.

DIR gets <machine>-gpu-cuda.json (report.py's format, rewritten after every row) and a log for each
stage. The document has, beyond what report.py says: `minutes` (the budget), `stages` ({name: state,
seconds}), `build`, `micro`, `tests`, `sanitizer` (stages.py), and `unavailable` (backends that were
asked for and why they can't run).
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from click import Choice, FloatRange, IntRange

from benchmarks import machine, report, stages
from benchmarks.process import run
from benchmarks.report import option
from benchmarks.suites import SUITES

# Seconds each stage may take of nine minutes; of more or less time, in proportion.
LIMITS = {"build": 240.0, "micro": 45.0, "headline": 40.0, "tests": 90.0, "sanitizer": 100.0,
          "suite": 540.0}  # fmt: skip
MINUTES = 9.0
RESERVE_S = 8.0  # of the budget, for a row that has been begun, and to end in
START_S = 8.0  # until a new process measures: torch, CUDA, the library


class Run:
    """A run: what is asked for, and the report as far as it is known."""

    def __init__(self, out: Path, minutes: float, device: str, **asked: Any) -> None:
        """`asked`: backends (the main one first), suite, repeats and min_time of the rows."""
        self.out, self.minutes, self.device, self.asked = out, minutes, device, asked
        self.end = time.monotonic() + minutes * 60 - RESERVE_S
        out.mkdir(parents=True, exist_ok=True)
        self.report = report.Report({"stages": {}})

    def left(self) -> float:
        return self.end - time.monotonic()

    def look(self, commit: str | None) -> bool:
        """The document's head, and which of the backends can be measured; false for none."""
        missing = machine.unavailable(self.asked["backends"])
        self.asked["backends"] = [of for of in self.asked["backends"] if of not in missing]
        document = report.document("gpu", self.asked["suite"], self.device)
        document |= {**({"commit": commit} if commit else {}), **self.report.document}
        document |= {"minutes": self.minutes, "unavailable": missing}
        self.report.document = document
        name = f"{machine.slug(document['machine'])}-gpu-{self.device}.json"
        self.report.path = self.out / name
        words = [f"not measured: {name}: {why}" for name, why in missing.items()]
        click.echo("\n".join([report.preamble(self.report.document), *words]))
        self.report.save()
        return bool(self.asked["backends"])

    def stage(self, name: str) -> bool:
        """Runs one, prints and records what it found; whether it went well."""
        start = time.monotonic()
        limit_s = min(LIMITS[name] * self.minutes / MINUTES, self.left())
        facts = self.found(name, limit_s) if limit_s >= 1 else stages.skipped("no time left")
        seconds = round(time.monotonic() - start, 1)
        states = {part["state"] for part in ([facts] if "state" in facts else facts.values())}
        state = next((s for s in ("failed", "cut", "skipped") if s in states), "done")
        self.report.document["stages"][name] = {"state": state, "seconds": seconds}
        if name not in ("headline", "suite"):
            self.report.document[name] = facts
            lines = [f"  {key}: {fact}" for key, fact in (facts.get("measured") or facts).items()]
            click.echo("\n".join([f"\n{name}", *lines]))
        click.echo(f"[{name}: {state} after {seconds} s, {self.left():.0f} s left]")
        self.report.save()
        return state != "failed" and (state != "cut" or name == "suite")

    def found(self, name: str, limit_s: float) -> dict[str, Any]:
        log = self.out / f"{name}.log"
        if name in ("headline", "suite"):
            return self.measured(self.asked["suite"] if name == "suite" else name, log, limit_s)
        if name in ("tests", "sanitizer"):
            return getattr(stages, name)(log, limit_s)
        if self.device == "cpu":
            return stages.skipped("no GPU")
        capability = torch.cuda.get_device_capability()
        architecture = "9.0a" if capability == (9, 0) else "{}.{}".format(*capability)
        return getattr(stages, name)(architecture, log, limit_s)

    def measured(self, suite: str, log: Path, limit_s: float) -> dict[str, Any]:
        """Has benchmarks.lstm measure what is left of a suite, in a new process after a row that
        failed, for it may have lost the process its GPU."""
        asked = self.asked
        backends = asked["backends"][: 1 if suite == "headline" else None]
        command = [sys.executable, "-m", "benchmarks.lstm", "--resume", f"--out={self.report.path}",
                   f"--suite={suite}", f"--device={self.device}", f"--repeats={asked['repeats']}",
                   f"--min-time={asked['min_time']}",
                   *(f"--backend={of}" for of in backends)]  # fmt: skip
        end, state, failed = time.monotonic() + limit_s, "cut", False
        while state == "cut" and (left := end - time.monotonic()) > START_S:
            timed = [*command, f"--minutes={(left - START_S) / 60}"]
            code = run(timed, log, left + RESERVE_S / 2, cwd=stages.PYTHON).code
            before = len(self.report.document["rows"])
            self.report.document = json.loads(Path(self.report.path or "").read_text())
            rows = self.report.document["rows"][before:]
            click.echo("\n".join(map(report.line, rows)))
            failed = failed or any("error" in row for row in rows)
            if code == 0:
                state = "cut" if "skipped" in self.report.document else "done"
                break
            if not rows:
                state = "failed"
        return {"state": "failed" if failed else state}


def run_stages(run: Run, wanted: list[str], commit: str | None = None) -> bool:
    """Runs the stages in order; whether all that ran went well."""
    built = "build" not in wanted or run.stage("build")
    # Where that failed, whatever else Python finds is not this checkout.
    usable = run.look(commit) and built
    return usable and all([run.stage(name) for name in wanted if name != "build"])


@click.command()
@option("--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder.")
@option("--minutes", type=FloatRange(0.01), default=MINUTES, help="To be done in.")
@option("--stage", "wanted", multiple=True, type=Choice(list(LIMITS)), help="Only this stage.")
@option("--installed", is_flag=True, help="Measure the fused_lstm that Python imports; build none.")
@option("--backend", "backends", multiple=True, default=("cuda", "triton"), help="The main first.")
@option("--suite", type=Choice(["gpu", *SUITES]), default="gpu", help="Of the last stage.")
@option("--device", type=Choice(["cuda", "cpu"]), default="cuda", help="cpu is a dry run.")
@option("--repeats", type=IntRange(2), default=2, help="Pairs to time in each row, at least.")
@option("--min-time", type=FloatRange(0), default=0.15, help="Seconds a row, at least.")
@option("--commit", help="The checkout's commit, where there is no git to ask.")
def main(
    wanted: tuple[str, ...], installed: bool, commit: str | None, device: str, **asked: Any
) -> None:
    """Build, measure, test and check fused_lstm on this GPU machine."""
    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            f"torch {torch.__version__} sees no NVIDIA GPU on this machine, and this command "
            "measures on one (--device cpu is a dry run)."
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    wanted = wanted or tuple(LIMITS)
    order = [name for name in LIMITS if name in wanted and not (installed and name == "build")]
    sys.exit(0 if run_stages(Run(device=device, **asked), order, commit) else 1)


if __name__ == "__main__":
    main()
