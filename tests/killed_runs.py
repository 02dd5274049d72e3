"""Kills charlm train with SIGKILL and resumes it: python killed_runs.py FOLDER KILLS SEED.

A process of its own, for children are forked from it: importing torch for each of them would take
most of the time. The first KILLS children die at a random moment, the others at each point of
writing a file. Prints a line for each and exits with the number of those that didn't end with the
weights, metrics and sample of a run never interrupted.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from charlm.cli import main
from charlm.corpus import builtin_text

TRAIN = (
    "--text text.txt --steps 48 --eval-every 14 --hidden 17 --window 17 --batch-size 9 --layers 2 "
    "--dropout 0.3 --embedding 12 --schedule plateau --patience 1 --decay 0.5 --length 60 "
    "--threads 1 --checkpoint-every 3"
).split()
FILES = ("model.safetensors", "sample.txt")


def result(run: Path) -> tuple[object, ...]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{**record, "seconds": 0} for record in records], *(
        (run / name).read_bytes() for name in FILES
    )


def charlm(arguments: list[str], before: Callable[[], None] = lambda: None) -> int:
    """Forks a child that runs charlm; returns its process id."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open("errors.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        before()
        try:
            main(arguments, standalone_mode=False)
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{arguments}: {error!r}\n".encode())
            os._exit(1)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dies(name: str, call: int) -> Callable[[], None]:
    """A child in which the call-th os.NAME is the last thing that happens, or almost happens."""

    def before() -> None:
        real = getattr(os, name)
        calls = 0

        def counted(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == call:
                if name == "replace":  # torn: the half of a file lies beside the whole one
                    path = Path(str(arguments[0]))
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(os, name, counted)

    return before


def check(label: str, run: Path, expected: tuple[object, ...]) -> bool:
    """Resumes a killed run and compares; one that was killed before it began is begun."""
    began = (run / "config.json").exists()
    arguments = ["--resume", str(run)] if began else [*TRAIN, "--run", str(run)]
    code = wait(charlm(["train", *arguments]))
    same = code == 0 and result(run) == expected
    leftovers = [path.name for path in run.glob(".*") if path.name != ".lock"]
    print(f"{label}: {'same' if same else f'DIFFERENT, exit {code}'}{leftovers or ''}", flush=True)
    return same and not leftovers


def whole(folder: Path, kills: int, seed: int) -> int:
    os.chdir(folder)
    torch.set_num_threads(1)
    generator = random.Random(seed)
    Path("text.txt").write_text(builtin_text()[:12_000], encoding="utf-8")
    begin = time.monotonic()
    assert wait(charlm(["train", *TRAIN, "--run", "whole"])) == 0, Path("errors.txt").read_text()
    seconds = time.monotonic() - begin
    expected = result(Path("whole"))
    failures = 0
    for number in range(kills):
        run = Path(f"killed-{number}")
        child = charlm(["train", *TRAIN, "--run", str(run)])
        moment = generator.uniform(0, seconds)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        wait(child)
        failures += not check(f"killed after {moment:.3f} s of {seconds:.3f}", run, expected)
    for name, call in (
        ("fsync", 4), ("fsync", 15), ("fsync", 16), ("fsync", 31), ("replace", 1), ("replace", 2),
        ("replace", 7), ("replace", 8), ("replace", 9), ("replace", 22), ("replace", 23),
    ):  # fmt: skip
        run = Path(f"{name}-{call}")
        code = wait(charlm(["train", *TRAIN, "--run", str(run)], dies(name, call)))
        assert code == -signal.SIGKILL, f"{name} was called fewer than {call} times: {code}"
        failures += not check(f"killed in os.{name} number {call}", run, expected)
    return failures


if __name__ == "__main__":
    sys.exit(whole(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
