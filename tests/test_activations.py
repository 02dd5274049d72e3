"""The kernels' sigmoid and tanh, read off a layer whose gates are its input (H = 1, weight one)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fused_lstm import _C

ISAS = [name for name, supported in _C.cpu_isas() if supported]
ULPS = {torch.float32: 2.0, torch.float64: 2.5}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    _C.force_cpu_isa(request.param)
    yield request.param
    _C.force_cpu_isa(None)


def activated(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """sigmoid(x) and tanh(x) as a layer saves them: gates i and g of one step over a batch of x."""
    weights = [x.new_ones(4, 1), x.new_zeros(4, 1)]
    zero = x.new_zeros(1, x.numel(), 1)
    forward = torch.ops.fused_lstm.lstm_forward
    gates = forward(x.view(1, -1, 1), None, zero, zero, weights)[3]
    return {"sigmoid": gates[0, :, 0], "tanh": gates[0, :, 2]}


def truth(x: torch.Tensor) -> dict[str, np.ndarray]:
    wide = x.to(torch.float64).numpy().astype(np.longdouble)
    with np.errstate(over="ignore"):
        return {"sigmoid": 1 / (1 + np.exp(-wide)), "tanh": np.tanh(wide)}


def worst_ulps(got: torch.Tensor, expected: np.ndarray) -> float:
    info = torch.finfo(got.dtype)
    normal = np.abs(expected) >= info.tiny
    spacing = info.eps * np.exp2(np.floor(np.log2(np.abs(expected[normal]))))
    error = np.abs(got.to(torch.float64).numpy().astype(np.longdouble)[normal] - expected[normal])
    return float((error / spacing).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sweep_within_stated_ulps(isa: str, dtype: torch.dtype) -> None:
    near_zero = torch.logspace(-30, 2, 200_003, dtype=torch.float64)
    wide = torch.linspace(-95, 95, 400_001, dtype=torch.float64)
    curved = torch.linspace(-20, 20, 1_000_003, dtype=torch.float64)  # where the error is largest
    x = torch.cat([wide, curved, near_zero, -near_zero])
    x = x.to(dtype)
    for name, got in activated(x).items():
        assert worst_ulps(got, truth(x)[name]) <= ULPS[dtype], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_rounded_once(isa: str, dtype: torch.dtype) -> None:
    """All finite values: within a hair over half a unit, what rounding an accurate result gives."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    for name, got in activated(x).items():
        assert worst_ulps(got, truth(x)[name]) <= 0.51, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_limits_and_nan(isa: str, dtype: torch.dtype) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 3e4, -3e4, 0.0], dtype=dtype)
    got = activated(x)
    assert got["sigmoid"].tolist()[:2] == [1.0, 0.0] and got["sigmoid"].tolist()[3:] == [1, 0, 0.5]
    assert got["tanh"].tolist()[:2] == [1.0, -1.0] and got["tanh"].tolist()[3:] == [1, -1, 0]
    assert got["sigmoid"][2].isnan() and got["tanh"][2].isnan()
