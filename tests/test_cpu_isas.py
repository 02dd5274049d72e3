"""The CPU kernels of every instruction set that this processor has, forward and backward."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fresh_process import run_python
from parity import DTYPES, Options, check

from fused_lstm import _C, FusedLSTM

HERE = Path(__file__).parent
SUPPORTED = [name for name, supported in _C.cpu_isas() if supported]

CASES = {
    "one of each": Options(I=1, H=1, T=1, B=1),
    "odd": Options(I=3, H=17, T=5, B=3, bidirectional=True),
    "one sequence": Options(I=33, H=129, T=7, B=1),
    "one step": Options(I=17, H=33, T=1, B=1, num_layers=2),
    "many rows": Options(I=17, H=33, T=3, B=33),
    "projected": Options(I=3, H=65, T=5, B=3, proj_size=17, bias=False),
    "packed": Options(I=17, H=33, T=9, B=7, kind="unsorted", bidirectional=True),
    "large": Options(I=65, H=257, T=3, B=17),
    "larger, many rows": Options(I=5, H=353, T=3, B=131),
    "few rows": Options(I=129, H=129, T=5, B=3),
    "few rows, every option": Options(
        I=257, H=161, T=3, B=7, proj_size=33, kind="unsorted", bidirectional=True
    ),
    "weights of the input beyond the cache": Options(I=1601, H=257, T=5, B=17),
}


@pytest.fixture(params=SUPPORTED)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.force_cpu_isa(request.param)
    assert _C.cpu_isa() == request.param
    yield request.param
    _C.force_cpu_isa(None)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", CASES)
def test_parity(isa: str, name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["odd", "one sequence", "packed", "projected"])
def test_threads(isa: str, name: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(CASES[name], torch.float32)
        check(CASES[name], torch.bfloat16)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_limits_of_the_gates(isa: str, dtype: torch.dtype) -> None:
    """Saturated gates are exactly 0, 1 or -1, infinities included, and NaN is not hidden."""
    lstm = FusedLSTM(1, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(torch.tensor([[1.0], [1.0], [1.0], [1.0]]))
        lstm.weight_hh_l0.zero_()
        infinity = float("inf")
        x = torch.tensor([[[-infinity], [-1e4], [0.0], [1e4], [infinity], [float("nan")]]])
        output, (_, c_n) = lstm(x.to(dtype))
    # h = sigmoid(x) tanh(c), c = sigmoid(x) tanh(x)
    high = torch.tensor(1.0, dtype=torch.float64).tanh().to(dtype).item()
    expected = torch.tensor([0.0, 0.0, 0.0, high, high, float("nan")], dtype=dtype)
    torch.testing.assert_close(output.flatten(), expected, equal_nan=True)
    cells = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, float("nan")], dtype=dtype)
    assert torch.equal(c_n.flatten()[:5].abs(), cells[:5]) and c_n.flatten()[5].isnan()


def test_best_is_chosen() -> None:
    assert _C.cpu_isa() == SUPPORTED[-1] or "FUSED_LSTM_CPU" in os.environ


def test_unknown_or_unsupported() -> None:
    before = _C.cpu_isa()
    for name in ["sse9"] + [name for name, supported in _C.cpu_isas() if not supported]:
        with pytest.raises(ValueError, match=f"'{name}' here; this build and processor offer: gen"):
            _C.force_cpu_isa(name)
    assert _C.cpu_isa() == before


def test_environment_variable() -> None:
    code = "import torch; from fused_lstm import _C; print(_C.cpu_isa())"
    found = run_python("-c", code, FUSED_LSTM_CPU="generic")
    assert found.stdout == "generic\n", found.stderr
    found = run_python("-c", code, FUSED_LSTM_CPU="sse9")
    assert found.returncode == 1
    last = found.stderr.splitlines()[-1]
    assert last.startswith("ValueError: no CPU kernels for instruction set 'sse9' here; this build")


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="has one instruction set")
def test_a_set_has_what_it_leaves_out_from_the_one_before(tmp_path: Path) -> None:
    sources = [HERE.parent / "csrc/cpu/dispatch.cpp", HERE / "kernel_layers/sets.cpp"]
    have = ["-DFUSED_LSTM_HAVE_GENERIC", "-DFUSED_LSTM_HAVE_AVX2"]
    program = str(tmp_path / "sets")
    subprocess.run(["g++", "-std=c++20", *have, *map(str, sources), "-o", program], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    if "no AVX2" in said:
        pytest.skip(said)
    # the passes: streams with weights of their own width, bfloat16 and 8 bits; -1: there are none
    assert said.splitlines() == ["0: 0 -1 1", "0: 0 -1 -1", "1: 1 -1 1", "0: 0 -1 1"]
