"""As on an ordinary PC: a processor with AVX2 and nothing wider, for torch and oneDNN too."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fused_lstm import _C

HERE = Path(__file__).resolve().parent
WIDER = [name for name, usable in _C.cpu_isas() if usable and name not in ("generic", "avx2")]
FACTS = """
import torch
from fused_lstm import _C
lstm = torch.nn.LSTM(3, 5)
try:
    with torch.autocast("cpu", torch.bfloat16):
        lstm(torch.randn(4, 2, 3))
    outcome = "served"
except RuntimeError as error:
    outcome = str(error)
print(_C.cpu_isa(), torch.backends.cpu.get_cpu_capability(), outcome)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """In which a process sees AVX2 only."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or not WIDER:
        pytest.skip("this processor has nothing wider than AVX2: all the other tests do it")
    compiler = shutil.which("cc") or pytest.skip("needs a C compiler, cc")
    library = tmp_path_factory.mktemp("mask") / "mask.so"
    source = HERE / "cpuid_mask.c"
    subprocess.run(
        [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"],
        check=True,
    )
    found = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = run(found, "-c", "pass")
    if "can't be made to fault" in done.stderr:
        pytest.skip("this processor or system can't make CPUID fault")
    return found


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=HERE, capture_output=True, text=True
    )


def test_what_is_chosen(environment: dict[str, str]) -> None:
    done = run(environment, "-c", FACTS)
    assert done.stdout.startswith("avx2 AVX2 could not create a primitive descriptor"), done


def test_autocast_and_parity(environment: dict[str, str]) -> None:
    files = ["test_autocast.py", "test_packed.py", "test_cpu_isas.py"]
    done = run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout + done.stderr
