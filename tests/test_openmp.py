"""One OpenMP runtime in the process: a second would start a second set of threads."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from fresh_process import run_python

PROGRAM = """
import torch
from fused_lstm import FusedLSTM, _C
lstm = FusedLSTM(33, 65)
output, _ = lstm(torch.randn(17, 9, 33))
output.sum().backward()
print(_C.build_info()["openmp"])
print(open("/proc/self/maps").read())
"""
RUNTIME = re.compile(r"/lib(?:gomp|omp|iomp5|omp5)[-.][^/]*$")


def runtimes(maps: str) -> set[Path]:
    """The OpenMP runtimes among the files that /proc/PID/maps lists."""
    paths = [line.split(maxsplit=5)[5] for line in maps.splitlines() if "/" in line]
    return {Path(path).resolve() for path in paths if RUNTIME.search(path)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime() -> None:
    done = run_python("-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    openmp, _, maps = done.stdout.partition("\n")
    found = runtimes(maps)
    assert len(found) <= 1, f"several OpenMP runtimes are loaded: {sorted(map(str, found))}"
    assert found or openmp != "yes", "built with OpenMP, but none is loaded: is RUNTIME complete?"


def test_runtimes_are_recognised() -> None:
    line = "7f00-7f10 r-xp 00000000 08:01 42                         "
    names = ["libgomp.so.1", "libgomp-a34b3233.so.1", "libiomp5.so", "libomp.so.5", "libtorch.so"]
    maps = "\n".join(f"{line}/some where/{name}" for name in names)
    found = runtimes(maps + "\n7f00-7f10 rw-p 00000000 00:00 0 [heap]")
    assert {path.name for path in found} == set(names[:-1])
