"""torch.func and forward-mode AD, against nn.LSTM in float64 or a plain loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fused_lstm import FusedLSTM, backend

Pair = tuple[nn.LSTM, FusedLSTM]


@pytest.fixture(params=["one layer", "two layers, both directions, projected"])
def pair(request: pytest.FixtureRequest) -> Pair:
    options: dict[str, Any] = {}
    if request.param != "one layer":
        options = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
    stock = nn.LSTM(2, 3, **options).double()
    return stock, FusedLSTM.from_torch(stock)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 2, dtype=torch.float64)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def loss(module: nn.Module, x: Tensor) -> Tensor:
    output, (h_n, c_n) = module(x)
    return output.pow(2).sum() + h_n.sum() * c_n.sin().sum()


def test_grad(pair: Pair, x: Tensor) -> None:
    expected, found = (grad(lambda x, m=module: loss(m, x))(x) for module in pair)
    close(found, expected)


def test_grad_of_the_weights(pair: Pair, x: Tensor) -> None:
    def gradients(module: nn.Module) -> dict[str, Tensor]:
        def of(parameters: dict[str, Tensor]) -> Tensor:
            output, _ = functional_call(module, parameters, (x,))
            return output.pow(2).sum()

        return grad(of)({name: p.detach() for name, p in module.named_parameters()})

    close(gradients(pair[1]), gradients(pair[0]))


def test_vjp(pair: Pair, x: Tensor) -> None:
    def pulled(module: nn.Module) -> Tensor:
        output, pull = vjp(lambda x: module(x)[0], x)
        return pull(torch.ones_like(output))[0]

    close(pulled(pair[1]), pulled(pair[0]))


def test_jvp(pair: Pair, x: Tensor) -> None:
    """The tangent, which torch.library's autograd alone would give as zeros."""
    expected, found = (jvp(lambda x, m=m: m(x), (x,), (x.cos(),)) for m in pair)
    close(found, expected)
    assert found[1][0].abs().min() > 0


def test_jacobians(pair: Pair, x: Tensor) -> None:
    for transform in (jacrev, jacfwd):
        expected, found = (transform(lambda x, m=m: m(x)[0])(x) for m in pair)
        close(found, expected)


def test_hessian(pair: Pair, x: Tensor) -> None:
    expected, found = (hessian(lambda x, m=m: loss(m, x))(x) for m in pair)
    close(found, expected)


def test_vmap_over_inputs(pair: Pair) -> None:
    xs = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    output, (h_n, c_n) = vmap(pair[1])(xs)
    one_by_one = [pair[0](x) for x in xs]  # nn.LSTM has no batching rule
    close(output, torch.stack([output for output, _ in one_by_one]))
    close(h_n, torch.stack([h_n for _, (h_n, _) in one_by_one]))
    close(c_n, torch.stack([c_n for _, (_, c_n) in one_by_one]))
    expected = torch.stack([pair[1](x)[0] for x in xs], 1)
    close(vmap(lambda x: pair[1](x)[0], in_dims=0, out_dims=1)(xs), expected)


def test_vmap_over_states(x: Tensor) -> None:
    lstm = FusedLSTM(2, 3).double()
    h_0, c_0 = torch.randn(2, 4, 1, 2, 3, dtype=torch.float64)
    found = vmap(lambda h, c: lstm(x, (h, c))[0])(h_0, c_0)
    close(found, torch.stack([lstm(x, (h, c))[0] for h, c in zip(h_0, c_0, strict=True)]))


def test_ensemble(x: Tensor) -> None:
    models = [FusedLSTM(2, 3).double() for _ in range(4)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def run(parameters: Any, buffers: Any) -> Tensor:
        return functional_call(base, (parameters, buffers), (x,))[0]

    close(vmap(run)(parameters, buffers), torch.stack([model(x)[0] for model in models]))


def test_gradients_of_each_sample() -> None:
    lstm = FusedLSTM(2, 3, batch_first=True).double()
    xs = torch.randn(4, 3, 2, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in lstm.named_parameters()}

    def of_one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(lstm, parameters, (x,))[0].pow(2).sum()

    found = vmap(grad(of_one), in_dims=(None, 0))(parameters, xs)
    for index, x in enumerate(xs):
        lstm.zero_grad()
        lstm(x)[0].pow(2).sum().backward()
        for name, parameter in lstm.named_parameters():
            close(found[name][index], parameter.grad)


def test_packed() -> None:
    """Against the operators' gradients: nn.LSTM does not take packed sequences in torch.func."""
    lstm = FusedLSTM(2, 3, bidirectional=True).double()
    right = pack_sequence([torch.randn(n, 2).double() for n in (1, 3, 2)], enforce_sorted=False)

    def run(data: Tensor) -> Tensor:
        output, (h_n, _) = lstm(PackedSequence(data, *right[1:]))
        return output.data.sum() + h_n.pow(3).sum()

    gradient = torch.autograd.functional.jacobian(run, right.data)
    for transform in (grad, jacrev, jacfwd):
        close(transform(run)(right.data), gradient)
    close(hessian(run)(right.data), torch.autograd.functional.hessian(run, right.data))


def test_forward_mode(pair: Pair, x: Tensor) -> None:
    def tangent(module: nn.Module) -> Tensor:
        with forward_ad.dual_level():
            output, _ = module(forward_ad.make_dual(x, x.cos()))
            return forward_ad.unpack_dual(output).tangent

    expected, found = tangent(pair[0]), tangent(pair[1])
    close(found, expected)
    close(pair[1](x), pair[0](x))  # and back to the kernels


def test_forward_over_reverse(x: Tensor) -> None:
    stock = nn.LSTM(2, 3).double()
    fused = FusedLSTM.from_torch(stock)

    def product(module: nn.Module) -> Tensor:
        return jvp(grad(lambda x: loss(module, x)), (x,), (x.cos(),))[1]

    close(product(fused), product(stock))


def test_jacobian_of_a_recorded_graph(x: Tensor) -> None:
    """vmap over torch.autograd.grad, where the forward ran outside."""
    lstm = FusedLSTM(2, 3).double()
    x.requires_grad_()
    output, _ = lstm(x)
    cotangents = torch.randn(5, *output.shape, dtype=torch.float64)

    def pull(cotangent: Tensor) -> Tensor:
        return torch.autograd.grad(output, x, cotangent, retain_graph=True)[0]

    close(vmap(pull)(cotangents), torch.stack([pull(each) for each in cotangents]))


def test_half_precision(x: Tensor) -> None:
    lstm = FusedLSTM(2, 17, dtype=torch.bfloat16)
    x = x.bfloat16()
    output, tangent = jvp(lambda x: lstm(x)[0], (x,), (x,))
    assert output.dtype is tangent.dtype is torch.bfloat16
    lstm, x = lstm.double(), x.double()
    _, exact = jvp(lambda x: lstm(x)[0], (x,), (x,))
    tolerance = 2**-7 * exact.abs().max().item()
    torch.testing.assert_close(tangent.double(), exact, rtol=0, atol=tolerance)


def test_forced_kernels_say_why_they_can_not(x: Tensor) -> None:
    lstm = FusedLSTM(2, 3).double()
    with backend("cpu"), pytest.raises(RuntimeError, match="forced backend 'cpu'.*torch.func"):
        grad(lambda x: lstm(x)[0].sum())(x)
