"""The Triton kernels against nn.LSTM in float64, on any device.

Not collected by itself: test_triton.py runs it in a process of its own under Triton's interpreter,
test_triton_gpu.py runs the same cases on a GPU.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401  before the kernels

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from parity import Arguments, Options, arguments, assert_close, results
from torch import Tensor, nn

from fused_lstm.ops import OPERATORS
from fused_lstm.triton import cell, layer
from fused_lstm.triton.plan import Plan

OURS = OPERATORS["triton"]

WHOLE = None  # what the table chooses for H <= 128
# The same as the table's, but small, so that few programs and units take every turn of the code:
# one group, which takes the tiles and directions one after the other, and two at once.
SPLIT = Plan("split", 16, 16, 2, 16, 0, 2, groups=1)
SPLIT_AHEAD = Plan("split", 16, 16, 2, 16, 1, 2, groups=2)
STREAMED = Plan("streamed", 16, 16, 1, 16, 0, 2, groups=2)

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
CASES = [
    (WHOLE, f32, Options(I=1, H=1, T=1, B=1)),
    (WHOLE, f32, Options(I=3, H=17, T=4, B=17, bidirectional=True)),
    (WHOLE, f32, Options(I=17, H=33, T=5, B=33, bidirectional=True, kind="packed")),
    (WHOLE, f32, Options(I=33, H=3, T=3, B=3, bias=False)),
    (WHOLE, bf16, Options(I=3, H=33, T=4, B=3, bidirectional=True)),
    (WHOLE, f16, Options(I=3, H=17, T=5, B=17, bidirectional=True, kind="packed")),
    (WHOLE, f16, Options(I=1, H=3, T=7, B=1)),
    (SPLIT, f32, Options(I=3, H=17, T=3, B=3)),
    (SPLIT, f32, Options(I=1, H=33, T=3, B=17, bidirectional=True, kind="packed")),
    (SPLIT, f32, Options(I=3, H=17, T=2, B=33, bidirectional=True, bias=False)),
    (SPLIT_AHEAD, f32, Options(I=3, H=129, T=2, B=2)),
    (SPLIT_AHEAD, bf16, Options(I=3, H=33, T=4, B=3)),
    (SPLIT, f16, Options(I=17, H=33, T=4, B=17, kind="packed")),
    (SPLIT, bf16, Options(I=3, H=1, T=3, B=1, bidirectional=True)),
    (STREAMED, f32, Options(I=3, H=17, T=3, B=17, bidirectional=True, kind="packed")),
    (STREAMED, bf16, Options(I=3, H=33, T=3, B=3)),
]


def name(case: tuple[Plan | None, torch.dtype, Options]) -> str:
    chosen, dtype, options = case
    sizes = "".join(f"{k}{getattr(options, k)}" for k in "IHTB")
    words = [chosen.kind if chosen else "whole", str(dtype)[6:], options.kind, sizes]
    return "-".join([*words, *(["both"] if options.bidirectional else [])])


def found_by_triton(stock: nn.LSTM, args: Arguments) -> dict[str, Tensor]:
    """What parity.results() gives, by the operators' functions."""
    assert args.hx is not None
    parameters = {key: of.detach() for key, of in stock.named_parameters()}
    weights = list(parameters.values())
    batch_sizes = None if args.layout is None else args.layout.batch_sizes
    inputs = [of.detach() for of in (args.input, *args.hx)]
    call = (inputs[0], batch_sizes, inputs[1], inputs[2], weights)
    output, h_n, c_n, gates, cells = OURS.lstm_forward(*call)
    without = OURS.lstm_inference(*call)
    for one, other in zip(without, (output, h_n, c_n), strict=True):
        assert torch.equal(one, other), "inference gives other bits than training"
    needs = [True] * (3 + len(weights))
    grads = OURS.lstm_backward(*args.cotangents, *call, output, gates, cells, needs)
    names = ("grad input", "grad h_0", "grad c_0", *(f"grad {key}" for key in parameters))
    found = {"output": output, "h_n": h_n, "c_n": c_n}
    found.update(zip(names, (*grads[:3], *grads[3]), strict=True))
    return found


def check(options: Options, dtype: torch.dtype, device: str = "cpu") -> None:
    """As parity.check() does, on `device`, whose nn.LSTM is the yardstick."""
    stock = options.lstm().to(device, dtype)
    exact = options.lstm().to(device).double()
    exact.load_state_dict(stock.state_dict())
    args = arguments(options, dtype, device)
    found = found_by_triton(stock, args.to(dtype))
    yardstick = results(stock, args.to(dtype))
    assert_close(found, yardstick, results(exact, args.to(torch.float64)))


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Makes every call take this plan, whatever the table says."""

    def force(chosen: Plan | None) -> None:
        if chosen is not None:
            monkeypatch.setattr(layer, "_plan", lambda *sizes: chosen)

    return force


@pytest.mark.parametrize("case", CASES, ids=name)
def test_parity(case: tuple[Plan | None, torch.dtype, Options], use) -> None:
    chosen, dtype, options = case
    use(chosen)
    check(options, dtype)


def small(
    H: int = 33, T: int = 4, B: int = 3, D: int = 1
) -> tuple[Tensor, None, Tensor, Tensor, list[Tensor]]:
    lstm = nn.LSTM(3, H, bidirectional=D == 2)
    h_0, c_0 = torch.randn(2, D, B, H)
    return torch.randn(T, B, 3), None, h_0, c_0, [of.detach() for of in lstm.parameters()]


@pytest.mark.parametrize("chosen", [WHOLE, SPLIT_AHEAD], ids=["whole", "split"])
def test_only_what_is_given_and_needed(chosen: Plan | None, use) -> None:
    """Without some cotangents, as with zeros; without some needs, as with them."""
    use(chosen)
    call = small(H=17, D=2)
    output, h_n, c_n, gates, cells = OURS.lstm_forward(*call)
    after = (*call, output, gates, cells)
    all_needs = [True] * 11
    dc = torch.randn_like(c_n)
    zeros = OURS.lstm_backward(
        torch.zeros_like(output), torch.zeros_like(h_n), dc, *after, all_needs
    )
    absent = OURS.lstm_backward(None, None, dc, *after, all_needs)
    some = OURS.lstm_backward(None, None, dc, *after, [k % 2 == 0 for k in range(11)])
    lists = [[*grads[:3], *grads[3]] for grads in (zeros, absent, some)]
    for k, (zero, one, other) in enumerate(zip(*lists, strict=True)):
        assert torch.equal(zero, one)
        assert torch.equal(other, one) if k % 2 == 0 else other.shape == (0,)


@pytest.mark.parametrize("chosen", [WHOLE, SPLIT_AHEAD, STREAMED], ids=["whole", "split", "str."])
def test_huge_and_not_a_number(chosen: Plan | None, use) -> None:
    """Saturated gates are exact, and a NaN stays in its sequence."""
    use(chosen)
    input, _, h_0, c_0, weights = small(H=17)
    weights[1].fill_(3e36)  # gates of up to 1e37
    output, _, c_n, *_ = OURS.lstm_forward(input, None, h_0, c_0, weights)
    assert torch.isfinite(output).all() and torch.isfinite(c_n).all()
    weights[2][:] = torch.tensor([1e30, -1e30, 1e30, 1e30]).repeat_interleave(17)
    for w in (weights[0], weights[1], weights[3]):
        w.zero_()
    output, _, c_n, *_ = OURS.lstm_forward(input, None, h_0, c_0, weights)
    assert (c_n == 1).all()
    torch.testing.assert_close(output, torch.full_like(output, np.tanh(1.0)))
    weights[0].normal_()
    clean = OURS.lstm_inference(input, None, h_0, c_0, weights)[0]
    input[1, 1, 0] = float("nan")
    output = OURS.lstm_inference(input, None, h_0, c_0, weights)[0]
    assert output[1:, 1].isnan().all()
    assert torch.equal(output[:, [0, 2]], clean[:, [0, 2]])
    assert torch.equal(output[0], clean[0])


def test_same_bits() -> None:
    call = small(D=2)
    for one, other in zip(OURS.lstm_forward(*call), OURS.lstm_forward(*call), strict=True):
        assert torch.equal(one, other)


def test_views_at_any_offset(use) -> None:
    """Pointers that are no multiple of 16 bytes, and strided tensors, are taken."""
    input, _, h_0, c_0, weights = small(H=17)
    expected = OURS.lstm_inference(input, None, h_0, c_0, weights)
    wide = torch.randn(4, 3, 7)
    wide[..., 1:4] = input
    odd = [torch.cat((torch.zeros(1), of.flatten()))[1:].view(of.shape) for of in (h_0, *weights)]
    found = OURS.lstm_inference(wide[..., 1:4], None, odd[0], c_0.mT.contiguous().mT, odd[1:])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@triton.jit
def _activations(x, of_sigmoid, of_tanh, size: tl.constexpr):
    at = tl.arange(0, size)
    value = tl.load(x + at)
    tl.store(of_sigmoid + at, cell.sigmoid(value))
    tl.store(of_tanh + at, cell.tanh(value))


def check_activations(device: str = "cpu") -> None:
    size = torch.logspace(-40, 38, 1024 - 8)
    limits = torch.tensor([0.0, 3.4e38, float("inf"), float("nan"), 0.25, 88.0, 104.0, 1e-45])
    x = torch.cat((size, limits, -size, -limits)).to(device)
    s, t = torch.full_like(x, 7), torch.full_like(x, 7)
    _activations[(1,)](x, s, t, size=2048)
    exact = x.double()
    assert (s.isnan() == x.isnan()).all() and (t.isnan() == x.isnan()).all()
    torch.testing.assert_close(t.double(), exact.tanh(), rtol=5e-7, atol=0, equal_nan=True)
    torch.testing.assert_close(s.double(), exact.sigmoid(), rtol=1e-6, atol=1e-38, equal_nan=True)
    assert (t[exact > 20] == 1).all() and (t[exact < -20] == -1).all()
    assert (s[exact > 40] == 1).all() and (s[exact < -1000] == 0).all()


def test_activations() -> None:
    check_activations()


# --- the barrier ----------------------------------------------------------------------------------


@pytest.fixture
def filled() -> Iterator[None]:
    """Memory that nothing has been written to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_removed_wait_shows(use, filled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that does not wait for the others reads what they have not written."""
    from fused_lstm.triton import backward, forward

    @triton.jit
    def no_wait(counter, target, patience):
        return patience

    use(SPLIT)
    call = small(T=6)
    right = OURS.lstm_forward(*call)
    cotangents = [torch.randn_like(of) for of in right[:3]]
    after = (*call, right[0], right[3], right[4], [True] * 7)
    grad = OURS.lstm_backward(*cotangents, *after)[0]
    torch.testing.assert_close(OURS.lstm_forward(*call)[0], right[0])
    torch.testing.assert_close(OURS.lstm_backward(*cotangents, *after)[0], grad)
    monkeypatch.setattr(triton_interpreter, "one_after_the_other", True)
    monkeypatch.setattr(forward, "wait", no_wait)
    monkeypatch.setattr(backward, "wait", no_wait)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(OURS.lstm_forward(*call)[0], right[0])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(OURS.lstm_backward(*cotangents, *after)[0], grad)


def test_broken_wait_ends(use, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that never comes gives NaN, then an error, and no hang."""
    from fused_lstm.triton import forward

    @triton.jit
    def no_signal(counter):
        pass

    use(SPLIT)
    call = small()
    with monkeypatch.context() as broken:
        broken.setattr(forward, "signal", no_signal)
        broken.setattr(layer, "PATIENCE", 20)
        output, h_n, *_ = OURS.lstm_forward(*call)
    assert torch.isfinite(output[0]).all() and output[1:].isnan().all() and h_n.isnan().all()
    with pytest.raises(RuntimeError, match="gave up waiting"):
        OURS.lstm_forward(*call)
    assert torch.isfinite(OURS.lstm_forward(*call)[0]).all()


def test_long(use) -> None:
    """Errors that grow with T, such as a cell state kept too narrow."""
    check(dataclasses.replace(Options(), H=3, T=25, B=2), bf16)
