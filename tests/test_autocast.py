"""Autocast on the CPU: the dtypes nn.LSTM gives, and results as good as its."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from parity import Arguments, Options, arguments, assert_close, call, results
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_lstm import FusedLSTM, autocast, backend

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATES = (None, torch.float32, torch.bfloat16)
# What nn.LSTM says where oneDNN has nothing for the autocast dtype on this processor.
LACKS_CODE = "could not create a primitive"


def dtypes(module: nn.Module, args: Any, cast: torch.dtype, gradients: bool = False) -> Any:
    with torch.autocast("cpu", cast), torch.set_grad_enabled(gradients):
        output, (h_n, c_n) = module(*args)
    output = output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output
    return output.dtype, h_n.dtype, c_n.dtype


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["3-D", "packed", "equal lengths"])
@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_dtypes(gradients: bool, proj_size: int, kind: str, cast: torch.dtype) -> None:
    """Of the results, for combinations of the dtypes of weights, input and states."""
    served = 0
    equal = kind == "equal lengths"
    options = Options(
        I=4, H=3, T=5, B=3, kind="packed", proj_size=proj_size, num_layers=1 + gradients
    )
    if kind == "3-D":
        options = dataclasses.replace(options, kind=kind)
    for weights, input, states in itertools.product(FLOATS[:3], FLOATS, STATES):
        stock = options.lstm(dtype=weights).train(gradients)
        fused = FusedLSTM.from_torch(stock)
        drawn = arguments(options, torch.float32)
        x: Any = drawn.input.to(input)
        if equal:
            x = nn.utils.rnn.pack_padded_sequence(x.new_zeros(5, 3, 4), [5, 5, 5])
        elif drawn.layout is not None:
            x = nn.utils.rnn.PackedSequence(x, *drawn.layout[1:])
        args = (x, None if states is None else tuple(state.to(states) for state in drawn.hx))
        try:
            expected = dtypes(stock, args, cast, gradients)
        except RuntimeError as error:
            if LACKS_CODE in str(error):  # where oneDNN has it, all is in autocast's dtype
                assert dtypes(fused, args, cast, gradients) == (cast, cast, cast)
                served += 1
                continue
            with pytest.raises(RuntimeError) as found:
                dtypes(fused, args, cast, gradients)
            assert str(found.value) == str(error)
        else:
            assert dtypes(fused, args, cast, gradients) == expected, (weights, input, states)
            served += 1
    assert served > 5


def test_dtypes_without_onednn() -> None:
    """What decides is asked anew when the user switches oneDNN off."""
    stock = nn.LSTM(4, 3)
    fused = FusedLSTM.from_torch(stock)
    args = (torch.zeros(5, 2, 4), (torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)))
    for enabled in (True, False, True):
        with torch.backends.mkldnn.flags(enabled=enabled):
            found = dtypes(fused, args, torch.bfloat16)
            try:
                assert found == dtypes(stock, args, torch.bfloat16)
            except RuntimeError as error:
                assert LACKS_CODE in str(error) and found == (torch.bfloat16,) * 3
    with torch.backends.mkldnn.flags(enabled=False):
        assert found[2] is torch.bfloat16 and dtypes(fused, args, torch.bfloat16)[2] is FLOATS[0]


def test_asking_disturbs_nothing() -> None:
    """No random number is drawn, and neither a transform nor a fake tensor is in the way."""
    lstm = FusedLSTM(4, 3)
    x = torch.randn(5, 2, 4)
    autocast._asked.cache_clear()
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        expected = [tensor.dtype for tensor in (lambda o, s: (o, *s))(*lstm(x))]
    assert torch.equal(torch.get_rng_state(), before)

    autocast._asked.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        output, (h_n, c_n) = lstm(x)
    assert [output.dtype, h_n.dtype, c_n.dtype] == expected

    autocast._asked.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        output = torch.func.vmap(lambda rows: lstm(rows)[0])(x.unsqueeze(0))
    assert output.dtype is expected[0]


@pytest.mark.parametrize(
    "options",
    [
        Options(I=17, H=33, T=9, B=3),
        Options(I=17, H=33, T=9, B=3, num_layers=2, bidirectional=True, batch_first=True),
        Options(I=17, H=33, T=9, B=3, proj_size=5),
        Options(I=17, H=33, T=9, B=3, kind="unsorted"),
    ],
    ids=["plain", "stacked", "projected", "packed"],
)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_results(options: Options, weights: torch.dtype) -> None:
    """Outputs, states, and gradients, with an error at most twice that of nn.LSTM."""
    stock = options.lstm(dtype=weights)
    exact = options.lstm().double()
    exact.load_state_dict(stock.state_dict())
    args = arguments(options, torch.float32)
    fused = FusedLSTM.from_torch(stock)
    found = results(Cast(fused), with_cotangents_of(fused, args))
    yardstick = yardstick_of(stock, args)
    truth = results(Cast(exact, enabled=False), args.to(torch.float64))
    assert_close(found, yardstick, truth, precision=torch.bfloat16)


def yardstick_of(stock: nn.LSTM, args: Arguments) -> dict[str, Tensor]:
    """nn.LSTM's results; on a processor for which oneDNN has no code, those that it has composed
    of operators, in the dtypes that oneDNN would have given."""
    try:
        return results(Cast(stock), with_cotangents_of(stock, args))
    except RuntimeError as error:
        assert LACKS_CODE in str(error)
    with torch.backends.mkldnn.flags(enabled=False):
        composed = results(Cast(stock), with_cotangents_of(stock, args))
    forward = ("output", "h_n", "c_n")
    return {k: t.bfloat16() if k in forward else t for k, t in composed.items()}


class Cast(nn.Module):
    """A module under autocast to bfloat16."""

    def __init__(self, module: nn.Module, enabled: bool = True) -> None:
        super().__init__()
        self.module = module
        self.enabled = enabled

    def forward(self, *args: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.module(*args)


def with_cotangents_of(module: nn.Module, args: Arguments) -> Arguments:
    """The arguments, with cotangents in the dtypes of the module's results under autocast."""
    with torch.no_grad():
        outputs = call(Cast(module), args)
    copied = args.to(torch.float32)
    first, second, third = (
        cotangent.to(output.dtype)
        for cotangent, output in zip(copied.cotangents, outputs, strict=True)
    )
    copied.cotangents = (first, second, third)
    return copied


def test_backward_inside_autocast() -> None:
    lstm = FusedLSTM(3, 4)
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lstm(x)[0].float().sum()
        outside = torch.autograd.grad(loss, lstm.weight_hh_l0, retain_graph=True)[0]
        assert outside.dtype is torch.float32
        loss.backward()
    assert torch.equal(lstm.weight_hh_l0.grad, outside)


def test_dtypes_of_no_sequences() -> None:
    """oneDNN does not serve an empty batch, so that nn.LSTM's states stay wide."""
    stock = nn.LSTM(4, 3)
    args = (torch.zeros(5, 0, 4),)
    for cast in (torch.bfloat16, torch.float16):
        found = dtypes(FusedLSTM.from_torch(stock), args, cast)
        assert found == dtypes(stock, args, cast) == (torch.float32,) * 3


@pytest.mark.parametrize("chosen", ["cpu", "reference"])
def test_same_bits_as_in_that_dtype(chosen: str) -> None:
    """Autocast decides what is computed in, and then nothing inside is cast again."""
    lstm = FusedLSTM(17, 33, 2)
    narrow = copy.deepcopy(lstm).bfloat16()
    x = torch.randn(9, 3, 17)
    with backend(chosen):
        expected = narrow(x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            found = lstm(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_disabled_and_other_devices() -> None:
    lstm = FusedLSTM(3, 4)
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert lstm(x)[0].dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert lstm(x)[0].dtype is torch.float32
