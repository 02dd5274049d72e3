"""`FusedLSTM.stream`: the bits of single steps, narrower weights, states."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from parity import DTYPES, Options, assert_close, assert_same_bits
from torch import Tensor, nn

from fused_lstm import _C, FusedLSTM
from fused_lstm.stream import Stream

SETS = [name for name, usable in _C.cpu_isas() if usable]
STEPS = 5
BFLOAT16, INT8 = torch.bfloat16, torch.int8

CASES = [
    Options(I=1, H=1, B=1),
    Options(I=3, H=17, B=1, bias=False),
    Options(I=128, H=128, B=1),
    Options(I=61, H=65, B=1, num_layers=3, proj_size=17),
    Options(I=33, H=129, B=3, num_layers=2),
    Options(I=257, H=64, B=8),
    Options(I=61, H=65, B=8, num_layers=2, proj_size=33, bias=False),
    Options(I=5, H=7, B=128, num_layers=2, proj_size=3),
    Options(I=17, H=129, B=128),
]


def name(o: Options) -> str:
    return f"I{o.I}H{o.H}B{o.B}L{o.num_layers}P{o.proj_size}b{o.bias:d}"


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_isa()
    _C.force_cpu_isa(request.param)
    yield request.param
    _C.force_cpu_isa(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def module(options: Options, dtype: torch.dtype = torch.float32) -> FusedLSTM:
    return FusedLSTM.from_torch(options.lstm()).to(dtype)


def inputs(options: Options, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(STEPS, options.B, options.I).to(dtype)


def named(output: Tensor, state: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"output": output, "h_n": state[0], "c_n": state[1]}


def streamed(stream: Stream, x: Tensor) -> dict[str, Tensor]:
    """All steps one by one."""
    return named(torch.stack([stream(step) for step in x]), stream.state)


@torch.no_grad()
def stepwise(lstm: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """The module called with one step after the other."""
    output, hx = [], None
    for step in x:
        y, hx = lstm(step.unsqueeze(0), hx)
        output.append(y[0])
    return named(torch.stack(output), hx)


# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", CASES, ids=name)
def test_bits_of_single_steps(options: Options, dtype: torch.dtype, isa: str) -> None:
    lstm, x = module(options, dtype), inputs(options, dtype)
    found = streamed(lstm.stream(options.B), x)
    assert_same_bits(found, stepwise(lstm, x), isa)
    chunk = lstm.stream(options.B)
    assert_same_bits(found, named(chunk(x), chunk.state), "in one call")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", CASES, ids=name)
def test_error_at_most_twice_torchs(options: Options, dtype: torch.dtype, isa: str) -> None:
    lstm, x = module(options, dtype), inputs(options, dtype)
    exact = options.lstm().double()
    exact.load_state_dict(lstm.state_dict())
    found = streamed(lstm.stream(options.B), x)
    assert_close(found, stepwise(lstm.to_torch(), x), stepwise(exact, x.double()))


@pytest.mark.parametrize("options", CASES, ids=name)
def test_bfloat16_weights_are_exact_but_for_their_rounding(options: Options, isa: str) -> None:
    lstm, x = module(options), inputs(options)
    found = streamed(lstm.stream(options.B, weights=BFLOAT16), x)
    with torch.no_grad():
        for weight in lstm.parameters():
            if weight.dim() == 2:
                weight.copy_(weight.bfloat16())
    exact = options.lstm().double()
    exact.load_state_dict(lstm.state_dict())
    assert_close(found, stepwise(lstm.to_torch(), x), stepwise(exact, x.double()))


def quantised(weight: Tensor) -> Tensor:
    """What int8 with a scale a row makes of it."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return torch.where(scale > 0, (weight / scale).round() * scale, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", CASES, ids=name)
def test_int8_weights_are_exact_but_for_their_rounding(
    options: Options, dtype: torch.dtype, isa: str
) -> None:
    """What quantising the operand adds is a fiftieth of what quantising the weights does."""
    lstm, x = module(options, dtype), inputs(options, dtype)
    found = streamed(lstm.stream(options.B, weights=INT8), x)
    exact, rounded = options.lstm().double(), options.lstm().double()
    for into in (exact, rounded):
        into.load_state_dict(lstm.state_dict())
    with torch.no_grad():
        for weight, own in zip(rounded.parameters(), lstm.parameters(), strict=True):
            if weight.dim() == 2:
                weight.copy_(quantised(own.float()))
    truth, unquantised = stepwise(rounded, x.double()), stepwise(exact, x.double())
    rounding = torch.finfo(dtype).eps * 4
    for what, tensor in found.items():
        error = (tensor.double() - truth[what]).abs().max().item()
        weights = (unquantised[what] - truth[what]).abs().max().item()
        assert error <= weights / 50 + rounding, (what, error, weights)


def test_zero_weights_in_int8() -> None:
    lstm = FusedLSTM(5, 7, bias=False)
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
        lstm.weight_ih_l0[3].zero_()
    assert lstm.stream(weights=INT8)(torch.randn(1, 5)).isfinite().all()


@pytest.mark.parametrize("weights", [None, BFLOAT16, INT8], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_lost(value: float, weights: torch.dtype | None, isa: str) -> None:
    stream, x = FusedLSTM(33, 17).stream(3, weights=weights), torch.randn(3, 33)
    x[1, 7] = value
    if value == value:
        x[1, 8] = -value  # their products' sum is NaN
    y = stream(x)
    assert y[1].isnan().all() and y[::2].isfinite().all()


@pytest.mark.parametrize("weights", [None, BFLOAT16, INT8], ids=str)
@pytest.mark.parametrize("patient", [True, False])
def test_bits_do_not_depend_on_threads(
    weights: torch.dtype | None, patient: bool, threads: Callable[[int], None]
) -> None:
    lstm, x = FusedLSTM(129, 515, 2, proj_size=131), torch.randn(STEPS, 3, 129)
    threads(1)
    alone = streamed(lstm.stream(3, weights=weights), x)
    threads(2)
    _C.set_patient(patient)  # otherwise one goes on alone
    try:
        several = lstm.stream(3, weights=weights)
        assert_same_bits(streamed(several, x), alone, "two threads")
        chunk = lstm.stream(3, weights=weights)
        assert_same_bits(named(chunk(x), chunk.state), alone, "two threads, one call")
    finally:
        _C.set_patient(True)


# --- what goes in and out -------------------------------------------------------------------------


def test_out_and_strides() -> None:
    lstm, x = FusedLSTM(6, 5), torch.randn(STEPS, 3, 6)
    expected = lstm.stream(3)(x)
    base = torch.zeros(STEPS, 3, 12)
    base[..., ::2] = x
    assert torch.equal(lstm.stream(3)(base[..., ::2]), expected)
    wide = torch.zeros(3, STEPS, 9)
    out = wide.transpose(0, 1)[..., 2:7]
    assert lstm.stream(3)(x.transpose(0, 1).contiguous().transpose(0, 1), out) is out
    assert torch.equal(out, expected)
    assert (wide[..., :2] == 0).all() and (wide[..., 7:] == 0).all()
    stream, y = lstm.stream(3), torch.empty(3, 5)
    version = y._version
    for t in range(STEPS):
        assert torch.equal(stream(x[t], out=y), expected[t])
    assert y._version > version
    assert torch.equal(lstm.stream(3)(-torch._neg_view(x)), expected)
    assert lstm.stream(3)(x[:0]).shape == (0, 3, 5)


def test_out_may_be_the_input() -> None:
    lstm, x = FusedLSTM(32, 32), torch.randn(3, 32)
    expected = lstm.stream(3)(x)
    assert torch.equal(lstm.stream(3)(x, out=x), expected)


def test_needs_no_gradient() -> None:
    lstm = FusedLSTM(3, 5).train()
    y = lstm.stream()(torch.randn(1, 3, requires_grad=True))
    assert not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(lstm.stream()(torch.zeros(1, 3)), lstm.stream()(torch.zeros(1, 3)))


def test_reset_of_rows() -> None:
    lstm, x = FusedLSTM(3, 17, 2, proj_size=5), torch.randn(STEPS, 4, 3)
    stream, fresh = lstm.stream(4), lstm.stream(4)
    fresh = fresh(x[0])
    for rows, expected in (
        (2, [2]),
        ([0, 3], [0, 3]),
        (torch.tensor([1]), [1]),
        (torch.tensor([True, False, False, True]), [0, 3]),
        (torch.zeros(4, dtype=torch.bool), []),
        ((), []),
        (None, [0, 1, 2, 3]),
    ):
        stream(x[1:])
        before = stream.fork()
        stream.reset(rows)
        for state in stream.state:
            assert not state[:, expected].any()
        went_on, y = before(x[0]), stream(x[0])
        others = [row for row in range(4) if row not in expected]
        assert torch.equal(y[expected], fresh[expected])
        assert torch.equal(y[others], went_on[others])
    for rows in (4, -1, [0, 4], torch.ones(3, dtype=torch.bool)):
        with pytest.raises(IndexError):
            stream.reset(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_get_and_set(dtype: torch.dtype) -> None:
    lstm, x = FusedLSTM(3, 17, 2, proj_size=5, dtype=dtype), torch.randn(STEPS, 3, 3).to(dtype)
    stream = lstm.stream(3)
    assert not stream.state[0].any() and not stream.state[1].any()
    stream(x)
    h, c = stream.state
    assert h.shape == (2, 3, 5) and c.shape == (2, 3, 17)
    assert h.dtype is dtype and c.dtype is dtype
    other = lstm.stream(3)
    other.state = h, c
    copies = h.clone(), c.clone()
    assert_same_bits(
        dict(zip("hc", other.state, strict=True)), dict(zip("hc", copies, strict=True)), dtype
    )
    expected, _ = lstm(x[:1], (h, c))
    y = other(x[0])
    assert torch.equal(h, copies[0])  # what was got is no view
    torch.testing.assert_close(y, expected[0].detach())
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(stream(x[0]), y)


def test_forks_go_their_own_ways() -> None:
    lstm, x = FusedLSTM(3, 17), torch.randn(STEPS, 2, 3)
    stream = lstm.stream(2, weights=BFLOAT16)
    stream(x[0])
    fork = stream.fork()
    assert isinstance(fork, Stream) and fork.weights is BFLOAT16 and fork.batch_size == 2
    ahead = stream(x[1])
    assert torch.equal(fork(x[1]), ahead)
    stream(x[2])
    assert torch.equal(fork.fork()(x[3]), fork(x[3]))
    before = [state.clone() for state in fork.state]
    stream.reset()
    for state, kept in zip(fork.state, before, strict=True):
        assert torch.equal(state, kept)


@pytest.mark.parametrize("weights", [None, BFLOAT16, INT8], ids=str)
def test_holds_a_copy_until_refreshed(weights: torch.dtype | None) -> None:
    lstm, x = FusedLSTM(3, 17, 2), torch.randn(STEPS, 2, 3)
    stream, twin = lstm.stream(2, weights=weights), lstm.stream(2, weights=weights)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.mul_(2)
    assert torch.equal(stream(x[0]), twin(x[0]))
    fork = stream.fork()
    state = stream.state
    stream.refresh()
    for now, then in zip(stream.state, state, strict=True):
        assert torch.equal(now, then)
    anew = lstm.stream(2, weights=weights)
    anew.state = state
    y = stream(x[1])
    assert torch.equal(y, anew(x[1]))
    assert torch.equal(fork(x[1]), twin(x[1]))
    fork.refresh()
    lstm.double()
    fork.refresh()  # whatever dtype the module has now


def test_a_dtype_of_its_own() -> None:
    lstm, x = FusedLSTM(3, 17), torch.randn(STEPS, 1, 3).bfloat16()
    stream = lstm.stream(dtype=BFLOAT16)
    assert torch.equal(stream(x), lstm.bfloat16().stream()(x))
    assert stream.dtype is stream.weights is BFLOAT16


def test_parametrized_weights() -> None:
    lstm, x = FusedLSTM(3, 5), torch.randn(1, 3)
    torch.nn.utils.parametrizations.weight_norm(lstm, "weight_hh_l0")
    assert torch.equal(lstm.stream()(x), lstm(x)[0])
