"""The same input gives the same bits: again, in another process, whatever memory held before."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from parity import DTYPES, Options, arguments, results

import fused_lstm
from fused_lstm import FusedLSTM

CASES = {
    "plain": Options(I=17, H=129, T=9, B=5),
    "one sequence": Options(I=33, H=129, T=9, B=1, num_layers=2),
    "both directions, packed": Options(I=3, H=65, T=9, B=9, bidirectional=True, kind="unsorted"),
    "projected": Options(I=17, H=65, T=9, B=5, proj_size=33),
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


def digest(options: Options, dtype: torch.dtype) -> str:
    """Of the bits of the outputs, states and all gradients of one call from a fixed seed."""
    torch.manual_seed(0)
    lstm = FusedLSTM.from_torch(options.lstm().to(dtype))
    found = results(lstm, arguments(options, dtype))
    total = hashlib.sha256()
    for name, tensor in found.items():
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CASES)
def test_same_bits_again(name: str, dtype: torch.dtype) -> None:
    first = digest(CASES[name], dtype)
    for fill in (float("nan"), 1e30, 0.0):
        # What the allocator gives out next was full of this.
        for size in (10, 1000, 100_000):
            torch.full((size,), fill)
        assert digest(CASES[name], dtype) == first


def test_same_bits_in_another_process() -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import torch; torch.set_num_threads(2); "
        "from test_determinism import *; from fused_lstm import _C; _C.set_any_pace(True); "
        "print(*[digest(options, torch.float32) for options in CASES.values()])"
    )
    folders = [str(Path(__file__).parent), str(Path(fused_lstm.__file__).parent.parent)]
    command = [sys.executable, "-c", code, *folders]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    torch.set_num_threads(2)
    assert found == [digest(options, torch.float32) for options in CASES.values()]
