"""Parity with `torch.nn.LSTM`: error at most twice its own at that precision, both against float64.

`torch.nn.LSTM` in float64 is the truth, `torch.nn.LSTM` in the tested dtype the yardstick. All
three start from the same numbers, rounded to the tested dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fused_lstm import FusedLSTM

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Added to twice the error of nn.LSTM, whose few elements in a small case can by luck all be rounded
# well, so that twice its error is less than a right result may have:
# - in units of the dtype's epsilon times the largest magnitude among the true results of that kind
#   (outputs and states; gradients): rounding a result is half a unit, and a gradient is a sum of
#   terms as large as the largest;
FLOOR = 2.0
# - the same for float64, where the truth is nn.LSTM itself, whose own error then seems nothing;
FLOOR_FLOAT64 = 64.0
# - in units of the epsilon of float32 (float64's for float64): the gates' sums, of magnitude 1 to 4
#   whatever the size of the result, are rounded to that.
FLOOR_OF_SUMS = 4.0


@dataclass(frozen=True)
class Options:
    """One case: nn.LSTM's options, the input's kind and sizes."""

    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    bidirectional: bool = False
    proj_size: int = 0
    given_hx: bool = True
    kind: str = "3-D"  # "2-D", "packed", "unsorted"
    I: int = 3  # noqa: E741  the field's name
    H: int = 17
    T: int = 5
    B: int = 3

    def lstm(self, **kwargs: Any) -> nn.LSTM:
        return nn.LSTM(
            self.I,
            self.H,
            num_layers=self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
            proj_size=self.proj_size,
            **kwargs,
        )

    def lengths(self) -> list[int]:
        """Of the packed sequences: from T down to one step, several of each."""
        lengths = [max(1, self.T - (self.T * b + b) // max(1, self.B - 1)) for b in range(self.B)]
        lengths[0] = self.T
        return lengths if self.kind == "packed" else lengths[1:] + lengths[:1]


@dataclass
class Arguments:
    """What one call takes, and the cotangents of what it returns."""

    input: Tensor  # padded; (T, I), (T, B, I), (B, T, I) or a packed sequence's rows (N, I)
    layout: PackedSequence | None  # batch_sizes and indices of a packed sequence
    hx: tuple[Tensor, Tensor] | None
    cotangents: tuple[Tensor, Tensor, Tensor]

    def to(self, dtype: torch.dtype, device: str | None = None) -> Arguments:
        """A copy, on the device it is on unless another is named."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype, copy=True)

        return Arguments(
            cast(self.input),
            None if self.layout is None else self.layout.to(device=device or self.input.device),
            None if self.hx is None else (cast(self.hx[0]), cast(self.hx[1])),
            (cast(self.cotangents[0]), cast(self.cotangents[1]), cast(self.cotangents[2])),
        )


def arguments(options: Options, dtype: torch.dtype, device: str = "cpu") -> Arguments:
    """Random arguments for one call, in `dtype`; the same numbers on every device."""
    T, B = options.T, options.B
    layout = None
    shape: tuple[int, ...] = (T, B)
    if options.kind == "2-D":
        shape = (T,)
    elif options.kind in ("packed", "unsorted"):
        sequences = [torch.zeros(length) for length in options.lengths()]
        layout = pack_sequence(sequences, enforce_sorted=options.kind == "packed")
        shape = (layout.data.shape[0],)
    elif options.batch_first:
        shape = (B, T)
    directions = 2 if options.bidirectional else 1
    P = options.proj_size or options.H
    batch = () if options.kind == "2-D" else (B,)
    h = (options.num_layers * directions, *batch, P)
    c = (options.num_layers * directions, *batch, options.H)
    hx = (torch.randn(h), torch.randn(c)) if options.given_hx else None
    cotangents = (torch.randn(*shape, directions * P), torch.randn(h), torch.randn(c))
    return Arguments(torch.randn(*shape, options.I), layout, hx, cotangents).to(dtype, device)


def call(module: nn.Module, args: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The module's output (packed: its rows), h_n and c_n."""
    input: Any = args.input
    if args.layout is not None:
        input = PackedSequence(input, *args.layout[1:])
    output, (h_n, c_n) = module(input, args.hx)
    return output.data if args.layout is not None else output, h_n, c_n


def results(module: nn.Module, args: Arguments) -> dict[str, Tensor]:
    """Outputs, states and every gradient of one call, by name."""
    args.input.requires_grad_()
    for state in args.hx or ():
        state.requires_grad_()
    module.zero_grad()
    outputs = call(module, args)
    torch.autograd.backward(outputs, args.cotangents)
    found = dict(zip(("output", "h_n", "c_n"), outputs, strict=True))
    found["grad input"] = args.input.grad
    for name, state in zip(("grad h_0", "grad c_0"), args.hx or (), strict=False):
        found[name] = state.grad
    for name, parameter in module.named_parameters():
        found[f"grad {name}"] = parameter.grad
    return {name: value.detach().clone() for name, value in found.items()}


def check(
    options: Options,
    dtype: torch.dtype,
    run: Callable[[nn.Module, Arguments], dict[str, Tensor]] = results,
    device: str = "cpu",
    precision: torch.dtype | None = None,
) -> None:
    """Runs one case with nn.LSTM in float64 and `dtype`, and with FusedLSTM in `dtype`."""
    stock = options.lstm().to(device, dtype)
    exact = options.lstm().to(device, torch.float64)
    exact.load_state_dict(stock.state_dict())
    fused = FusedLSTM.from_torch(stock)
    args = arguments(options, dtype, device)
    truth = run(exact, args.to(torch.float64))
    yardstick = run(stock, args.to(dtype))
    found = run(fused, args.to(dtype))
    assert_close(found, yardstick, truth, precision)


def assert_close(
    found: dict[str, Tensor],
    yardstick: dict[str, Tensor],
    truth: dict[str, Tensor],
    precision: torch.dtype | None = None,
) -> None:
    """Error at most twice the yardstick's plus the floor; the same shape, dtype and, on the CPU,
    strides.

    `precision` is what was computed in, where that isn't the dtype of the results.
    """
    assert found.keys() == yardstick.keys() == truth.keys()
    largest = {False: 0.0, True: 0.0}
    for name, exact in truth.items():
        kind = name.startswith("grad")
        largest[kind] = max(largest[kind], exact.abs().max().item() if exact.numel() else 0.0)
    problems = []
    for name, tensor in found.items():
        stock, exact = yardstick[name], truth[name]
        kind = name.startswith("grad")
        if not kind and tensor.is_cpu:  # cuDNN's have a test of their own
            assert tensor.stride() == stock.stride(), (name, tensor.stride(), stock.stride())
        assert tensor.shape == stock.shape and tensor.dtype is stock.dtype, name
        if exact.numel() == 0:
            continue
        error = (tensor.double() - exact).abs().max().item()
        own = (stock.double() - exact).abs().max().item()
        floor = FLOOR_FLOAT64 if tensor.dtype is torch.float64 else FLOOR
        eps = torch.finfo(precision or tensor.dtype).eps
        eps_of_sums = min(eps, torch.finfo(torch.float32).eps)
        allowed = 2 * own + floor * eps * largest[kind] + FLOOR_OF_SUMS * eps_of_sums
        if not error <= allowed:  # NaN is a problem, too
            problems.append(f"{name}: error {error:.3g}, allowed {allowed:.3g}, nn.LSTM {own:.3g}")
    assert not problems, "; ".join(problems)


def inputs_of(lstm: nn.LSTM, args: Arguments) -> tuple[Any, ...]:
    """What the operators take: input, batch_sizes, h_0, c_0, weights."""
    hx = args.hx or tuple(torch.zeros_like(c) for c in args.cotangents[1:])
    batch_sizes = args.layout.batch_sizes if args.layout is not None else None
    weights = [parameter.detach() for parameter in lstm.parameters()]
    return (args.input.detach(), batch_sizes, *(state.detach() for state in hx), weights)


def assert_same_bits(found: dict[str, Tensor], other: dict[str, Tensor], what: object) -> None:
    for name, tensor in found.items():
        bits = [t.contiguous().view(torch.uint8) for t in (tensor, other[name])]
        assert torch.equal(*bits), f"{name} has other bits: {what}"
