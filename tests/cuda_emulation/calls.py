"""A layer's forward and backward by the emulated operators, and what they are compared with.

For tf32, which the CPU has not, the yardstick is PyTorch with operands rounded to it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from cuda_emulation.library import tf32
from parity import Arguments, Options, arguments, inputs_of, results
from torch import Tensor, nn

OPERANDS = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "tf32": torch.float32,
    "f32": torch.float32,
    "f64": torch.float64,
}


# --- one call -------------------------------------------------------------------------------------


def made(options: Options, operands: str) -> tuple[nn.LSTM, Arguments]:
    dtype = OPERANDS[operands]
    return options.lstm().to(dtype), arguments(options, dtype)


def exact_of(lstm: nn.LSTM) -> nn.LSTM:
    return copy.deepcopy(lstm).double()


def run(
    operands: str, lstm: nn.LSTM, args: Arguments, needs: Sequence[bool] | None = None
) -> dict[str, Tensor]:
    """As parity.results, by the emulated operators.."""
    ops = torch.ops.fused_lstm_emulation
    inputs = inputs_of(lstm, args)
    with tf32(operands == "tf32"):
        *outputs, gates, cells = ops.lstm_forward(*inputs)
        *grads, of_weights = ops.lstm_backward(
            *args.cotangents,
            *inputs,
            outputs[0],
            gates,
            cells,
            needs or [True] * (3 + len(inputs[4])),
        )
    found = dict(zip(("output", "h_n", "c_n", "grad input"), [*outputs, grads[0]], strict=True))
    for name, grad in zip(("grad h_0", "grad c_0"), grads[1:] if args.hx else (), strict=False):
        found[name] = grad
    names = [f"grad {name}" for name, _ in lstm.named_parameters()]
    return found | dict(zip(names, of_weights, strict=True))


def infer(operands: str, lstm: nn.LSTM, args: Arguments) -> dict[str, Tensor]:
    with tf32(operands == "tf32"):
        found = torch.ops.fused_lstm_emulation.lstm_inference(*inputs_of(lstm, args))
    return dict(zip(("output", "h_n", "c_n"), found, strict=True))


# --- yardsticks -----------------------------------------------------------------------------------


def rounded(t: Tensor) -> Tensor:
    """To tf32, ties away from zero."""
    return ((t.detach().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Tf32Product(torch.autograd.Function):
    """a b^T; the gradient of b exactly, as it comes from a product after the time loop."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return rounded(a) @ rounded(b).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return rounded(grads[0]) @ rounded(b), grads[0].t() @ a


class Tf32LSTM(nn.LSTM):
    """One layer of nn.LSTM whose recurrent products have operands of tf32."""

    def forward(self, input: Any, hx: Any = None) -> Any:  # type: ignore[override]
        packed = isinstance(input, torch.nn.utils.rnn.PackedSequence)
        rows = input.data if packed else input.flatten(0, 1)
        sizes = input.batch_sizes.tolist() if packed else [input.shape[1]] * input.shape[0]
        starts = [0, *itertools.accumulate(sizes)]
        weights = list(self.parameters())
        D = 2 if self.bidirectional else 1
        if hx is None:
            hx = [rows.new_zeros(D, sizes[0], self.hidden_size)] * 2
        each, outputs, states = len(weights) // D, [], []
        for d in range(D):
            w_ih, w_hh, *biases = weights[d * each : (d + 1) * each]
            h, c = hx[0][d], hx[1][d]
            products = rows @ w_ih.t() + sum(biases)
            parts: dict[int, Tensor] = {}
            for t in range(len(sizes)) if d == 0 else reversed(range(len(sizes))):
                n = sizes[t]
                gates = products[starts[t] : starts[t + 1]] + Tf32Product.apply(h[:n], w_hh)
                i, f, g, o = gates.chunk(4, 1)
                c_t = f.sigmoid() * c[:n] + i.sigmoid() * g.tanh()
                parts[t] = o.sigmoid() * c_t.tanh()
                h, c = torch.cat((parts[t], h[n:])), torch.cat((c_t, c[n:]))
            outputs.append(torch.cat([parts[t] for t in range(len(sizes))]))
            states.append((h, c))
        output = torch.cat(outputs, 1)
        h_n, c_n = (torch.stack(state) for state in zip(*states, strict=True))
        if packed:
            return input._replace(data=output), (h_n, c_n)
        return output.view(*input.shape[:2], -1), (h_n, c_n)


def yardstick_of(operands: str, stock: nn.LSTM, args: Arguments) -> dict[str, Tensor]:
    if operands == "tf32":
        rounding = Tf32LSTM(
            stock.input_size, stock.hidden_size, bias=stock.bias, bidirectional=stock.bidirectional
        )
        rounding.load_state_dict(stock.state_dict())
        return results(rounding, args)
    return results(stock, args)
