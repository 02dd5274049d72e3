"""The two places that know the gradient: csrc/autograd.cpp, for eager calls, and torch.library's
formula in fused_lstm/ops.py, for what is compiled or traced. They ask the backward for the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import Options
from test_compile import OPERATOR_CASES, _operands
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lstm.ops import OPERATORS, RECORDED, BackwardArguments, LayerArguments


class Backward(TorchDispatchMode):
    """The arguments of the backward that runs."""

    arguments: tuple[Any, ...]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in ("lstm_backward", "lstm_backward_consuming"):
            self.arguments = args
        return func(*args, **(kwargs or {}))


def asked(forward: Any, operands: tuple[Any, ...], used: tuple[int, ...]) -> BackwardArguments:
    """What the backward gets when a loss takes these of output, h_n and c_n."""
    results = forward(*operands)
    inputs = [of for of in (operands[0], *operands[2:4], *operands[4]) if of.requires_grad]
    with Backward() as backward:
        torch.autograd.grad(sum(results[k].sum() for k in used), inputs, retain_graph=True)
    return BackwardArguments(*backward.arguments)


@pytest.mark.parametrize("used", [(0, 1, 2), (0,), (1, 2)], ids=["all", "output", "states"])
@pytest.mark.parametrize("name", OPERATOR_CASES)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_both_formulas_ask_for_the_same(backend: str, name: str, used: tuple[int, ...]) -> None:
    """Argument by argument, whatever needs a gradient."""
    if backend == "triton":
        pytest.importorskip("triton")
    options: Options = OPERATOR_CASES[name]
    operands = _operands(options, torch.float64, requires_grad=True)
    tensors = (operands[0], *operands[2:4], *operands[4])
    for skipped in range(len(tensors)):
        for index, tensor in enumerate(tensors):
            tensor.requires_grad_(index != skipped)
        eager = asked(RECORDED[backend], operands, used)
        traced = asked(OPERATORS[backend].lstm_forward, operands, used)
        for argument, one, other in zip(eager._fields, eager, traced, strict=True):
            assert type(one) is type(other), argument
            if isinstance(one, Tensor):
                assert torch.equal(one, other), argument
            elif argument == "weights":
                assert all(map(torch.equal, one, other))
            else:
                assert one == other, argument


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_names_are_the_schemas(backend: str) -> None:
    for name, operator in OPERATORS[backend]._asdict().items():
        expected = BackwardArguments if "backward" in name else LayerArguments
        schema = operator._schema
        assert tuple(argument.name for argument in schema.arguments) == expected._fields
