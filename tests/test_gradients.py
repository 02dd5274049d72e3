"""Gradients of every order in float64: finite differences, and nn.LSTM's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import Options, arguments, call
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from fused_lstm import FusedLSTM, backend

CASES = {
    "plain": Options(I=2, H=3, T=3, B=2),
    "no bias, bidirectional": Options(I=2, H=2, T=2, B=2, bias=False, bidirectional=True),
    "projection, 2 layers": Options(I=2, H=3, T=2, B=2, proj_size=2, num_layers=2),
    "packed, bidirectional": Options(I=2, H=2, T=3, B=3, kind="unsorted", bidirectional=True),
    "projection, packed, no bias": Options(
        I=2, H=3, T=3, B=2, kind="packed", proj_size=1, bias=False
    ),
}


def function(options: Options) -> tuple[Any, list[Tensor]]:
    """A function of input, states and weights, and its inputs."""
    lstm = FusedLSTM.from_torch(options.lstm().double())
    args = arguments(options, torch.float64)
    names = [name for name, _ in lstm.named_parameters()]

    def run(input: Tensor, h_0: Tensor, c_0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        args.input, args.hx = input, (h_0, c_0)

        def module(*inputs: Any) -> Any:
            return torch.func.functional_call(lstm, dict(zip(names, weights, strict=True)), inputs)

        return call(module, args)

    assert args.hx is not None
    inputs = [args.input, *args.hx, *(p.detach().clone() for p in lstm.parameters())]
    return run, [tensor.requires_grad_() for tensor in inputs]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chosen", ["cpu", "reference"])
def test_first(name: str, chosen: str) -> None:
    run, inputs = function(CASES[name])
    with backend(chosen):
        assert gradcheck(run, inputs, check_batched_grad=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chosen", ["cpu", "reference"])
def test_second(name: str, chosen: str) -> None:
    run, inputs = function(CASES[name])
    with backend(chosen):
        assert gradgradcheck(run, inputs)


def test_forward_mode() -> None:
    run, inputs = function(CASES["packed, bidirectional"])
    assert gradcheck(run, inputs, check_forward_ad=True, check_backward_ad=False)


def _derivatives(module: nn.Module, x: Tensor, orders: int) -> list[Tensor]:
    """The gradients of several orders, of a loss in which the states depend on the input."""
    h_0 = x[0].mean(-1, keepdim=True).expand(1, x.shape[1], 3).tanh()
    output, (h_n, c_n) = module(x, (h_0, h_0.sin()))
    output, (h_n, c_n) = module(output @ output.new_ones(3, 2), (h_n, c_n))
    loss = output.pow(2).sum() + (h_n * c_n).sum()
    wanted = [x, *module.parameters()]
    found = []
    for _ in range(orders):
        grads = torch.autograd.grad(loss, wanted, create_graph=True)
        found += grads
        loss = sum((grad * grad.detach().cos()).sum() for grad in grads)
    return found


def test_third_order_with_states_that_depend_on_the_input() -> None:
    stock = nn.LSTM(2, 3).double()
    fused = FusedLSTM.from_torch(stock)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    for found, expected in zip(_derivatives(fused, x, 3), _derivatives(stock, x, 3), strict=True):
        torch.testing.assert_close(found, expected)


def test_double_backward_leaves_no_graph_unless_asked() -> None:
    lstm = FusedLSTM(2, 3)
    x = torch.randn(3, 2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(lstm(x)[0].sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.pow(2).sum(), lstm.weight_hh_l0)
    assert second.grad_fn is None and not second.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_penalty(dtype: torch.dtype) -> None:
    """Double backward in a training dtype, against float64."""
    lstm = FusedLSTM(3, 17, 2, dtype=dtype)
    exact = nn.LSTM(3, 17, 2).double()
    exact.load_state_dict(lstm.state_dict())
    x = torch.randn(5, 2, 3, dtype=dtype)
    found = []
    for module in (lstm, exact):
        leaf = x.to(next(module.parameters()).dtype).requires_grad_()
        (grad,) = torch.autograd.grad(module(leaf)[0].sum(), leaf, create_graph=True)
        grad.pow(2).sum().backward()
        found.append([parameter.grad.double() for parameter in module.parameters()])
    tolerance = 16 * torch.finfo(dtype).eps
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=0, atol=tolerance * expected.abs().max().item()
        )


class _Operators(torch.utils._python_dispatch.TorchDispatchMode):
    """Records which of this package's operators run, and what their backward is to give."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.needs: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fused_lstm":
            self.names.append(func._opname)
            if func._opname == "lstm_backward":
                self.needs.append(list(args[-1]))
        return func(*args, **(kwargs or {}))


def test_saves_nothing_when_no_gradient_is_wanted() -> None:
    lstm = FusedLSTM(3, 4, 2)
    x = torch.randn(2, 2, 3)
    with _Operators() as ran, torch.no_grad():
        lstm(x)
    assert ran.names == ["lstm_stack_inference"]
    with _Operators() as ran:
        lstm(x)
    assert ran.names == ["lstm_forward"] * 2
    lstm.requires_grad_(False)
    with _Operators() as ran:
        lstm(x)
    assert ran.names == ["lstm_stack_inference"]
    with _Operators() as ran:
        lstm(x.requires_grad_())
    assert ran.names == ["lstm_forward"] * 2


@pytest.mark.parametrize("which", [0, 1])
def test_only_one_state_wants_a_gradient(which: int) -> None:
    lstm = FusedLSTM(3, 4, 2).requires_grad_(False)
    x = torch.randn(5, 2, 3)
    hx = (torch.randn(2, 2, 4), torch.randn(2, 2, 4))
    hx[which].requires_grad_()
    found, expected = (
        torch.autograd.grad(module(x, hx)[0].sum(), hx[which]) for module in (lstm, lstm.to_torch())
    )
    torch.testing.assert_close(found, expected)


def test_what_is_saved_is_not_differentiable() -> None:
    lstm = FusedLSTM(3, 4)
    states = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    results = torch.ops.fused_lstm.lstm_forward(
        torch.randn(5, 2, 3), None, *states, list(lstm.parameters())
    )
    assert [result.requires_grad for result in results] == [True, True, True, False, False]


def test_frozen_weights() -> None:
    """Only the gradients that are wanted are computed, and they are the right ones."""
    lstm = FusedLSTM(3, 4, bidirectional=True)
    stock = lstm.to_torch()
    lstm.weight_hh_l0.requires_grad_(False)
    lstm.bias_ih_l0_reverse.requires_grad_(False)
    x = torch.randn(5, 2, 3)
    c_0 = torch.randn(2, 2, 4, requires_grad=True)
    grads = []
    for module in (lstm, stock):
        module.zero_grad()
        c_0.grad = None
        with _Operators() as ran:
            module(x, (torch.zeros_like(c_0).detach(), c_0))[0].sum().backward()
        if module is lstm:
            # input, h_0, c_0, then the weights of both directions
            assert ran.needs == [
                [False, False, True, True, False, True, True, True, True, False, True]
            ]
        grads.append([c_0.grad, *(p.grad for p in module.parameters())])
    for found, expected in zip(*grads, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("which", ["output", "h_n", "c_n"])
def test_one_result_only(which: str) -> None:
    """Gradients that are not there (two of the three results unused) count as zeros."""
    lstm = FusedLSTM(3, 4, 2, bidirectional=True)
    stock = lstm.to_torch()
    x = torch.randn(5, 2, 3)
    grads = []
    for module in (lstm, stock):
        module.zero_grad()
        output, (h_n, c_n) = module(x)
        {"output": output, "h_n": h_n, "c_n": c_n}[which].sum().backward()
        grads.append([parameter.grad.clone() for parameter in module.parameters()])
    torch.testing.assert_close(*grads)


def test_backward_in_evaluation_mode() -> None:
    lstm = FusedLSTM(3, 4, 2, dropout=0.5).eval()
    stock = lstm.to_torch()
    x = torch.randn(5, 2, 3)
    grads = []
    for module in (lstm, stock):
        module.zero_grad()
        module(x)[0].sum().backward()
        grads.append([parameter.grad.clone() for parameter in module.parameters()])
    torch.testing.assert_close(*grads)


def test_saved_tensor_hooks_and_checkpointing() -> None:
    lstm = FusedLSTM(3, 4)
    x = torch.randn(5, 2, 3, requires_grad=True)
    (plain,) = torch.autograd.grad(lstm(x)[0].sum(), x)
    with torch.autograd.graph.save_on_cpu():
        (offloaded,) = torch.autograd.grad(lstm(x)[0].sum(), x)
    output = torch.utils.checkpoint.checkpoint(lambda x: lstm(x)[0], x, use_reentrant=False)
    (recomputed,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(plain, offloaded) and torch.equal(plain, recomputed)


def test_jacobian_of_a_recorded_backward() -> None:
    lstm = FusedLSTM(2, 3, dtype=torch.float64)
    x = torch.randn(2, 1, 2, dtype=torch.float64)
    loops = torch.autograd.functional.jacobian(lambda x: lstm(x)[0], x)
    batched = torch.autograd.functional.jacobian(lambda x: lstm(x)[0], x, vectorize=True)
    torch.testing.assert_close(batched, loops)
