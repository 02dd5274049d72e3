"""Sides that take turns, each a process of its own that rests until it is asked."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.machine import without_paths
from benchmarks.measure import WrongResult, distance
from benchmarks.memory import kib
from benchmarks.steppers import Stepper

Make = Callable[[str], Stepper]  # of a side's name; a process is started with it
LIMIT_S = 120.0  # for an answer
AT_ONCE = 5  # steps, from a look at the clock's end to the next
# How far a third output may be from nn.LSTM's, in its norm. Of training it is the loss, and those
# of "fused" and "plain" have met other masks or another part of the text.
TOLERANCE = {"bf16": 2e-2, "int8": 0.1, "onnxruntime_int8": 0.1, "fused": 0.1, "plain": 0.1}
EXACT = 1e-4


def timed(made: Stepper, seconds: float, rest: float, at_once: int = AT_ONCE) -> list[float]:
    """Seconds of each step, for so long, so many and then a rest."""
    clock, call = time.perf_counter, made.call
    found: list[float] = []
    end = clock() + seconds
    while not found or clock() < end:
        for _ in range(at_once):
            start = clock()
            call()
            found.append((clock() - start) / made.steps)
        if rest:
            time.sleep(rest)
    return found


def grown(made: Stepper, steps: int) -> float:
    """MiB that so many steps add to this process."""
    before = kib("VmRSS")
    for _ in range(steps):
        made.call()
    return (kib("VmRSS") - before) / 1024


ASKED = {"timed": timed, "grown": grown}


def serve(to: Connection, side: str, threads: int, make: Make) -> None:
    """A side's process: tells its third output and its memory, then answers until it is closed."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    gc.disable()
    try:
        made = make(side)
        torch.set_grad_enabled(made.learns)
        third = [made.call() for _ in range(3)][-1]
        to.send((None if third is None else torch.as_tensor(third).numpy().copy(), made.bytes))
        while True:
            what, *how = to.recv()
            to.send(ASKED[what](made, *how))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, it belongs into the report
        to.send(f"{type(error).__name__}: {error}"[:400])


class Side:
    """The other end of `serve`."""

    def __init__(
        self, stack: ExitStack, name: str, threads: int, make: Make, limit_s: float
    ) -> None:
        # Children of a process that has imported torch and done nothing: quick to come, and none
        # is a fork of one that has computed.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self.name, self.threads, self.limit_s = name, threads, limit_s
        self._ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, threads, make))
        process.start()
        theirs.close()
        stack.callback(process.join)
        stack.callback(process.kill)
        self.output, self.bytes = self._answer()

    def ask(self, what: str, *how: Any) -> Any:
        self._ours.send((what, *how))
        return self._answer()

    def _answer(self) -> Any:
        """Raises RuntimeError where there is none."""
        try:
            late = not self._ours.poll(self.limit_s)
            answer = f"over {self.limit_s:g} s" if late else self._ours.recv()
        except EOFError:
            answer = "the process ended"
        if isinstance(answer, str):
            raise RuntimeError(without_paths(f"{self.name}: {answer}"))
        return answer


@contextmanager
def sides_of(
    make: Make, names: tuple[str, ...], threads: tuple[int, ...], limit_s: float = LIMIT_S
) -> Iterator[list[Side]]:
    """These sides with each number of threads, seen to agree with nn.LSTM if that is the first.

    Raises:
        WrongResult: one doesn't.
    """
    with ExitStack() as stack:
        sides = [Side(stack, name, of, make, limit_s) for name in names for of in threads]
        expected = sides[0].output if sides[0].name == "torch" else None
        for side in sides if expected is not None else ():
            error = distance(torch.from_numpy(side.output), torch.from_numpy(expected))
            if not error <= TOLERANCE.get(side.name, EXACT):
                raise WrongResult(f"{side.name} is {error:.2g} of its norm from nn.LSTM's output")
        yield sides


def in_turn(sides: list[Side], at: int, *asked: Any) -> Iterator[tuple[Side, Any]]:
    """Each side with what it answers; every other round begins with the last."""
    for side in sides[:: 1 if at % 2 else -1]:
        yield side, side.ask(*asked)
