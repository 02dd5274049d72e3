"""Programs and Python calls run in processes of their own, under a time limit.

On a GPU one bad kernel ends the process that launched it, and a hang must not take the run along:
what has been measured by then is worth keeping.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, without_paths
from benchmarks.suites import Row

LOG_BYTES = 4 << 20  # of a program's output that are kept

# A group of its own, so that what a program starts ends with it; in the session of this process,
# so that whoever ends that ends both.
_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
)


@dataclass(frozen=True)
class Done:
    code: int | None  # exit status; None if it ran past its limit
    seconds: float
    lines: list[str]  # of stdout and stderr together

    @property
    def state(self) -> str:
        return "cut" if self.code is None else "failed" if self.code else "done"


def run(
    command: list[str], log: Path, limit_s: float, *, cwd: Path = ROOT, **environment: str
) -> Done:
    """Run a program; its output is appended to `log` as it comes. Raises OSError if it can't start.

    At the limit its group is asked to end, for what it started may outlive it, and a moment later
    made to. An interrupt comes first: pytest then says which tests failed.
    """
    start = time.monotonic()
    code: int | None = None
    with log.open("a+b") as file:
        before = file.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command, cwd=cwd, env={**os.environ, **environment}, **_GROUP,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(limit_s)
        finally:  # also when this process is asked to end
            for signal_ in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal_)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(3)
        file.seek(before)
        output = file.read(LOG_BYTES)
        file.truncate()
    lines = output.decode(errors="replace").splitlines()
    return Done(code, round(time.monotonic() - start, 1), lines)


def each_side(
    function: Callable[[str, Row], Any], row: Row, *, unit: str, limit_s: float
) -> dict[str, Any]:
    """What `function` returns in a fresh process for each side, as `torch_<unit>` and
    `fused_<unit>`; `error` in place of them where it fails."""
    facts = {}
    spawn = multiprocessing.get_context("spawn")
    for side in ("torch", "fused"):
        ours, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_answer, args=(theirs, function, side, row))
        process.start()
        theirs.close()
        try:
            error, answer = ours.recv() if ours.poll(limit_s) else (f"over {limit_s:g} s", None)
        except EOFError:
            process.join(5)
            error = f"the process ended with status {process.exitcode}"
        finally:
            process.kill()
            process.join()
        if error:
            return {"error": without_paths(f"{side}: {error}")}
        facts[f"{side}_{unit}"] = answer
    return facts


def _answer(to: Connection, function: Callable[[str, Row], Any], side: str, row: Row) -> None:
    try:
        to.send((None, function(side, row)))
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs into the report
        to.send((f"{type(error).__name__}: {error}"[:400], None))
