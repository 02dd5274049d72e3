"""The Triton backend: its kernels under the interpreter, its choice of kernels, its absence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fresh_process import run_python
from parity import Options

from fused_lstm.ops import OPERATORS
from fused_lstm.triton import installed

OURS = OPERATORS["triton"]

needs_triton = pytest.mark.skipif(not installed()[0], reason=installed()[1])


@needs_triton
@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", ["triton_kernels.py", "triton_operators.py"])
def test_under_the_interpreter(file: str) -> None:
    """In a process where Triton interprets: it reads the variable once."""
    tests = Path(__file__).parent
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", str(tests.parent))
    ended = run_python(
        "-W", "ignore", "-m", "pytest", *options, str(tests / file),
        TRITON_INTERPRET="1",
    )  # fmt: skip
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_importing_imports_no_kernels() -> None:
    """Nor Triton; but torch.utils.flop_counter imports that, where it is."""
    code = """
import sys
import torch.utils.flop_counter
before = "triton" in sys.modules
import fused_lstm, fused_lstm.triton
fused_lstm.triton.installed()
str(fused_lstm.backends())
print(before == ("triton" in sys.modules), "fused_lstm.triton.layer" in sys.modules)
"""
    ended = run_python("-c", code)
    assert ended.stdout.split() == ["True", "False"], ended.stdout + ended.stderr


def test_without_triton() -> None:
    """The package works, and says what is missing."""
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from fused_lstm import FusedLSTM, backend, backends
lstm, x = FusedLSTM(2, 3), torch.zeros(1, 1, 2)
lstm(x)[0].sum().backward()
print(backends()["triton"])
with backend("triton"):
    lstm(x)
"""
    ended = run_python("-c", code)
    why = "Triton isn't installed: pip install triton"
    assert f"available=False, detail={why!r}" in ended.stdout, ended.stderr
    assert ended.stderr.strip().endswith(f"backend 'triton' can't serve this call: {why}")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        Options(bidirectional=True, proj_size=3),
        Options(B=17, bidirectional=True, proj_size=5, kind="packed", bias=False),
        Options(I=1, H=3, T=1, B=1, proj_size=1),
    ],
    ids=["proj", "packed", "smallest"],
)
def test_steps(options: Options, dtype: torch.dtype) -> None:
    """What no kernel serves: projections, and float64."""
    from triton_kernels import check

    check(options, dtype)


@needs_triton
@pytest.mark.parametrize("kind", ["3-D", "packed"])
def test_steps_in_float64(kind: str) -> None:
    from triton_kernels import check

    check(Options(T=7, B=5, bidirectional=True, kind=kind), torch.float64)


@needs_triton
def test_no_sequences() -> None:
    from triton_kernels import small

    call = small(B=0, D=2)
    output, h_n, c_n, gates, cells = OURS.lstm_forward(*call)
    assert output.shape == (4, 0, 66) and h_n.shape == c_n.shape == (2, 0, 33)
    after = (*call, output, gates, cells, [True] * 11)
    *states, of_weights = OURS.lstm_backward(output, h_n, c_n, *after)
    for grad, of in zip((*states, *of_weights), (call[0], *call[2:4], *call[4]), strict=True):
        assert grad.shape == of.shape and not grad.any()


@needs_triton
@pytest.mark.parametrize("sizes", [[2, 3], [3, 2, 0], [3, 1], [], [2, 2, 1]], ids=str)
def test_wrong_batch_sizes(sizes: list[int]) -> None:
    state = torch.zeros(1, 3, 4)
    weights = [torch.zeros(16, 2), torch.zeros(16, 4)]
    with pytest.raises(
        RuntimeError, match="batch_sizes (must start|starts at)|expected input of shape"
    ):
        OURS.lstm_inference(torch.zeros(5, 2), torch.tensor(sizes).long(), state, state, weights)


@needs_triton
def test_every_plan_fits() -> None:
    """On any device: programs that must run at once have a multiprocessor each, and memory."""
    from fused_lstm.triton.plan import Device, plan

    kinds = set()
    for device in (
        Device(132, 227 << 10, True),
        Device(16, 99 << 10, True),
        Device(304, 64 << 10, True),
        Device(8, 128 << 10, False),
    ):
        for H in (1, 16, 17, 33, 64, 65, 128, 129, 250, 512, 768, 1024, 1536, 2048, 4096, 9999):
            for B in (1, 16, 17, 64, 1000):
                for dtype in (torch.float16, torch.float32):
                    for backward in (False, True):
                        chosen = plan(backward, H, B, 2, False, dtype, False, device)
                        kinds.add(chosen.kind)
                        assert chosen.shared_memory <= device.shared_memory
                        if chosen.kind in ("split", "streamed"):
                            assert device.cooperative
                            slices = -(-H // chosen.block_h)
                            assert 1 <= chosen.groups * slices <= device.multiprocessors
                        if chosen.kind == "whole":
                            assert chosen.block_h >= H
    assert kinds == {"whole", "split", "streamed", "steps"}
