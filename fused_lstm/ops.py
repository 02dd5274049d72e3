"""What torch must know of the operators: shapes, gradients, vmap, FLOP counts.

The operators themselves, one LSTM layer with all its directions each, are registered by the
compiled part; csrc/schemas.h holds their schemas. Triton's kernels are as many more of the same:
on a GPU that both serve, a backward must be of the backend that ran the forward. Shapes here: T
steps, B sequences, I inputs, H cells, P outputs of one direction (H without projection), D
directions, N rows (T*B, or packed).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import register_flop_formula

from . import (
    _C,  # noqa: F401  registers the operators
    triton,
)
from .reference import lstm_layer


class Operators(NamedTuple):
    lstm_inference: OpOverload
    lstm_forward: OpOverload
    lstm_backward: OpOverload
    lstm_backward_consuming: OpOverload


def _operators(namespace: str) -> Operators:
    found = getattr(torch.ops, namespace)
    return Operators(*(getattr(found, name).default for name in Operators._fields))


_compiled = _operators("fused_lstm")
_library = torch.library.Library("fused_lstm_triton", "DEF")
for _operator in _compiled:
    _library.define(str(_operator._schema).partition("::")[2])
for _name in Operators._fields:
    for _key in ("CUDA", "XPU"):  # AMD's GPUs have CUDA's key
        _library.impl(_name, getattr(triton, _name), _key)
_of_triton = _operators("fused_lstm_triton")

# By the name of the backend.
OPERATORS = {"cpu": _compiled, "cuda": _compiled, "triton": _of_triton}

# Its `lstm_forward` for calls that are neither compiled nor traced: recorded by csrc/autograd.cpp,
# without gates and cells. What it takes from here is below, `lstm_backward_by_reference`.
_recorded = torch.ops.fused_lstm.lstm_recorded.default
RECORDED = {name: partial(_recorded, name == "triton") for name in OPERATORS}


# --- shapes, for torch.compile, FakeTensor and the meta device ------------------------------------


def _inference_shapes(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    output = input.new_empty((*input.shape[:-1], h_0.shape[0] * h_0.shape[2]))
    return output, input.new_empty(h_0.shape), input.new_empty(c_0.shape)


def _forward_shapes(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = input.shape[0] * input.shape[1] if batch_sizes is None else input.shape[0]
    output = input.new_empty((*input.shape[:-1], h_0.shape[0] * h_0.shape[2]))
    gates = input.new_empty((c_0.shape[0], rows, 4 * c_0.shape[2]))
    cells = input.new_empty((c_0.shape[0], rows, c_0.shape[2]))
    return output, input.new_empty(h_0.shape), input.new_empty(c_0.shape), gates, cells


def _backward_shapes(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    grads = [
        input.new_empty(tensor.shape if need else (0,))
        for tensor, need in zip((input, h_0, c_0, *weights), needs, strict=True)
    ]
    return grads[0], grads[1], grads[2], grads[3:]


# --- gradients ------------------------------------------------------------------------------------


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, batch_sizes, h_0, c_0, weights = inputs
    sequence, _, _, gates, cells = output
    ctx.mark_non_differentiable(gates, cells)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, batch_sizes, h_0, c_0, sequence, gates, cells, *weights)


def _backward(
    lstm_backward: OpOverload,
    ctx: Any,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_gates: None,
    grad_cells: None,
) -> tuple[Any, ...]:
    input, batch_sizes, h_0, c_0, output, gates, cells, *weights = ctx.saved_tensors
    needs_input, _, needs_h_0, needs_c_0, needs_weights = ctx.needs_input_grad
    needs = [needs_input, needs_h_0, needs_c_0, *needs_weights]
    given = (grad_output, grad_h_n, grad_c_n, input, batch_sizes, h_0, c_0, weights)
    if transform_under_way() or any(map(_is_batched, given[:3])):
        *states, of_weights = _backward_by_reference(*given, needs)
    else:
        *states, of_weights = lstm_backward(*given, output, gates, cells, needs)
    found = (*states, *of_weights)
    grads = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    return grads[0], None, grads[1], grads[2], grads[3:]


def _backward_by_reference(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """`lstm_backward` under vmap, for which it has no batching rule: the Jacobian of what was
    recorded outside."""
    with torch.autocast(input.device.type, enabled=False):
        found = _reference_gradients(
            (grad_output, grad_h_n, grad_c_n), (input, h_0, c_0, *weights), batch_sizes, needs
        )
    grads = [input.new_empty((0,)) if grad is None else grad for grad in found]
    return grads[0], grads[1], grads[2], grads[3:]


# For csrc/autograd.cpp, which calls this kernel, wherever the tensors are: dispatching the operator
# would apply the transforms to it.
_from_here = torch.library.Library("fused_lstm", "FRAGMENT")
_from_here.define(
    "lstm_backward_by_reference(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
    "Tensor input, Tensor? batch_sizes, Tensor h_0, Tensor c_0, Tensor[] weights, bool[] needs)"
    " -> (Tensor grad_input, Tensor grad_h_0, Tensor grad_c_0, Tensor[] grad_weights)"
)
_from_here.impl("lstm_backward_by_reference", _backward_by_reference, "CPU")


def _reference_gradients(
    grads_of_results: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    batch_sizes: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """What `lstm_backward` computes, by differentiating the reference path. Unlike
    torch.autograd.grad, torch.func.vjp takes the direct dependence on each tensor only (the states
    may depend on the input, too), and composes with transforms and further orders."""
    given = [index for index, grad in enumerate(grads_of_results) if grad is not None]

    def results(*wanted: Tensor) -> tuple[Tensor, ...]:
        input, h_0, c_0, *weights = _merged(tensors, needs, wanted)
        found = lstm_layer(input, batch_sizes, h_0, c_0, weights)
        return tuple(found[index] for index in given)

    wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    pull = torch.func.vjp(results, *wanted)[1]
    grads = pull(tuple(grads_of_results[index] for index in given))
    return _merged([None] * len(tensors), needs, grads)


def _merged(tensors: Sequence[Any], mask: Sequence[bool], others: Sequence[Tensor]) -> list[Any]:
    """`tensors` with the next of `others` wherever the mask says so."""
    rest = iter(others)
    return [next(rest) if taken else tensor for tensor, taken in zip(tensors, mask, strict=True)]


def _is_batched(tensor: Tensor | None) -> bool:
    """By `torch.autograd.grad(..., is_grads_batched=True)`, whose vmap is not torch.func's."""
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


@torch.compiler.assume_constant_result  # TorchDynamo guards on the transforms by itself
def transform_under_way() -> bool:
    """Whether the call is inside a transform of torch.func."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *grads, input, batch_sizes, h_0, c_0, weights, _, _, _, needs = inputs
    ctx.needs = needs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(batch_sizes, *grads, input, h_0, c_0, *weights)


def _double_backward(ctx: Any, *grad_grads: Any) -> tuple[Any, ...]:
    """Differentiates the backward by differentiating the reference path twice.

    `output`, `gates` and `cells` are functions of the other arguments, and are recomputed: what
    depends on them is in the gradients of those arguments, and they get none of their own.
    """
    batch_sizes, *tensors = ctx.saved_tensors
    wanted = [*ctx.needs_input_grad[:4], *ctx.needs_input_grad[5:7], *ctx.needs_input_grad[7]]
    cotangents = (*grad_grads[:3], *grad_grads[3])
    used = [need and c is not None for need, c in zip(ctx.needs, cotangents, strict=True)]

    def gradients(*variables: Tensor) -> tuple[Tensor, ...]:
        merged = _merged(tensors, wanted, variables)
        found = _reference_gradients(merged[:3], merged[3:], batch_sizes, used)
        return tuple(grad for grad in found if grad is not None)

    grads: list[Tensor | None] = [None] * len(wanted)
    if any(used) and any(grad is not None for grad in tensors[:3]):
        with torch.autocast(tensors[3].device.type, enabled=False):
            variables = [tensor for tensor, want in zip(tensors, wanted, strict=True) if want]
            pull = torch.func.vjp(gradients, *variables)[1]
            found = pull(tuple(c for c, use in zip(cotangents, used, strict=True) if use))
        grads = _merged(grads, wanted, found)
    return (*grads[:4], None, grads[4], grads[5], grads[6:], None, None, None, None)


# --- FLOPs, two for each multiplication and addition of the matrix products -----------------------


def _forward_flops(
    input: Sequence[int],
    batch_sizes: Any,
    h_0: Sequence[int],
    c_0: Sequence[int],
    weights: Sequence[Sequence[int]],
    *args: Any,
    **kwargs: Any,
) -> int:
    return 2 * _rows(input) * _matrix_elements(weights)


def _backward_flops(
    grad_output: Any,
    grad_h_n: Any,
    grad_c_n: Any,
    input: Sequence[int],
    batch_sizes: Any,
    h_0: Sequence[int],
    c_0: Sequence[int],
    weights: Sequence[Sequence[int]],
    output: Any,
    gates: Any,
    cells: Any,
    needs: Sequence[bool],
    *args: Any,
    **kwargs: Any,
) -> int:
    each = len(weights) // h_0[0]
    through = [w for k, w in enumerate(weights) if k % each != 0 or needs[0]]  # w_ih only for dx
    to_weights = [w for w, need in zip(weights, needs[3:], strict=True) if need]
    return 2 * _rows(input) * (_matrix_elements(through) + _matrix_elements(to_weights))


def _rows(input: Sequence[int]) -> int:
    return input[0] * input[1] if len(input) == 3 else input[0]


def _matrix_elements(weights: Sequence[Sequence[int]]) -> int:
    return sum(shape[0] * shape[1] for shape in weights if len(shape) == 2)


# --- all of it, for both --------------------------------------------------------------------------

for _each in (_compiled, _of_triton):
    torch.library.register_fake(_each.lstm_inference)(_inference_shapes)
    torch.library.register_fake(_each.lstm_forward)(_forward_shapes)
    torch.library.register_fake(_each.lstm_backward)(_backward_shapes)
    torch.library.register_fake(_each.lstm_backward_consuming)(_backward_shapes)
    torch.library.register_autograd(
        _each.lstm_forward, partial(_backward, _each.lstm_backward), setup_context=_save_forward
    )
    torch.library.register_autograd(
        _each.lstm_backward, _double_backward, setup_context=_save_backward
    )
    register_flop_formula([_each.lstm_inference.overloadpacket, _each.lstm_forward.overloadpacket])(
        _forward_flops
    )
    register_flop_formula(
        [_each.lstm_backward.overloadpacket, _each.lstm_backward_consuming.overloadpacket]
    )(_backward_flops)
