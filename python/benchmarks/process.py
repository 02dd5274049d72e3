"""Programs and Python calls run in processes of their own, under a time limit.

On a GPU one bad kernel ends the process that launched it, and a hang must not take the run along:
what has been measured by then is worth keeping.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

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
    command: list[str],
    log: Path,
    *,
    limit_s: float,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> Done:
    """Run a program; its output goes to `log` as it comes. Raises OSError if it can't be started.

    At the limit it is asked to end, and a moment later made to.
    """
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **_GROUP,
    )  # fmt: skip
    lines: list[str] = []
    reader = threading.Thread(target=_copy, args=(process.stdout, log, lines), daemon=True)
    reader.start()
    code: int | None
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        code = None
    finally:  # also when this process is asked to end
        _end(process)
    reader.join(5)
    return Done(code, round(time.monotonic() - start, 1), list(lines))


def _copy(stream: Any, log: Path, lines: list[str]) -> None:
    """Each line as it comes to the end of `log` and of `lines`, up to LOG_BYTES."""
    written = 0
    with log.open("a", encoding="utf-8") as file:
        for line in stream:
            written += len(line)
            if written <= LOG_BYTES:
                file.write(line)
                file.flush()
                lines.append(line.rstrip("\n"))


def _end(process: subprocess.Popen[str]) -> None:
    """End the program's group: what it started may outlive it. An interrupt comes first: pytest
    then says which tests failed."""
    for signal_ in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal_)
        with suppress(subprocess.TimeoutExpired):
            process.wait(3)


class Failure(Exception):
    """A call that raised, died or did not answer; str() says which."""


class Worker:
    """A process that runs one Python call after another; started again when one ended it.

    Its environment and sys.path are those of this process at its start. What it prints goes to
    `log`.
    """

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: Any = None
        self._connection: Connection | None = None

    def call(self, function: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
        """What `function`, a module's own, returns. Raises Failure."""
        if self._process is None:
            self._start()
        assert self._connection is not None
        try:
            self._connection.send((function, arguments))
            if not self._connection.poll(limit_s):
                self.close()
                raise Failure(f"no answer in {limit_s:.0f} s: the process was ended")
            good, answer, alive = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            code = self._process.exitcode
            self.close()
            raise Failure(f"the process ended with status {code}") from error
        if not alive:
            self.close()
        if not good:
            raise Failure(answer)
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join(10)
            self._process = self._connection = None

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")  # CUDA doesn't survive a fork
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, str(self._log)), daemon=True)
        self._process.start()
        theirs.close()


def _serve(connection: Connection, log: str) -> None:
    """The worker's side: answers (good, answer, whether the process can go on)."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*arguments), True))
            continue
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs into the report
            first = str(error).strip().partition("\n")[0]
            message = f"{type(error).__name__}: {first}"[:400]
        alive = _recovered()
        connection.send((False, message, alive))
        if not alive:
            return


def _recovered() -> bool:
    """Whether the GPU still serves this process; memory of what failed is given back."""
    torch = sys.modules.get("torch")
    gc.collect()
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:  # after an illegal access every call fails
        return False
    return True
