"""What torch must know of the operators: shapes, gradients, vmap, FLOP counts.

The operators themselves, one LSTM layer with all its directions each, are registered by the
compiled part; csrc/schemas.h holds their schemas. Triton's are as many more of the same
(csrc/triton.cpp). For CPUs there is one more, of a stack of L layers. Shapes here: T steps, B
sequences, I inputs, H cells, P outputs of one direction (H without projection), D directions, N
rows (T*B, or packed). In place of an input's one-hot rows, CPUs also take int64 ids, without I, and
w_ih in the dtype of sums.
"""

from collections.abc import Iterable, Sequence
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
_recurrence = torch.library.Library("fused_lstm_triton", "IMPL")
for _name in ("recurrence_forward", "recurrence_backward"):
    _recurrence.impl(_name, getattr(triton, _name), "CompositeExplicitAutograd")
_of_triton = _operators("fused_lstm_triton")

lstm_stack_inference: OpOverload = torch.ops.fused_lstm.lstm_stack_inference.default

# By the name of the backend.
OPERATORS = {"cpu": _compiled, "cuda": _compiled, "triton": _of_triton}

# Its `lstm_forward` for calls that are neither compiled nor traced: recorded by csrc/autograd.cpp,
# without gates and cells. What it takes from here is below, `lstm_backward_by_reference`.
_recorded = torch.ops.fused_lstm.lstm_recorded.default
RECORDED = {name: partial(_recorded, name == "triton") for name in OPERATORS}


# --- their arguments, by the names and in the order of the schemas --------------------------------


class LayerArguments(NamedTuple):
    input: Any
    batch_sizes: Any
    h_0: Any
    c_0: Any
    weights: Any


class BackwardArguments(NamedTuple):
    """Tensors, or for each of them its shape, or whether it needs a gradient, as torch gives it."""

    grad_output: Any
    grad_h_n: Any
    grad_c_n: Any
    input: Any
    batch_sizes: Any
    h_0: Any
    c_0: Any
    weights: Any
    output: Any
    gates: Any
    cells: Any
    needs: Any

    def cotangents(self) -> tuple[Any, Any, Any]:
        return self.grad_output, self.grad_h_n, self.grad_c_n

    def differentiable(self) -> tuple[Any, ...]:
        """The tensors that `needs` is about: input, h_0, c_0, weights."""
        return self.input, self.h_0, self.c_0, *self.weights


Gradients = tuple[Tensor, Tensor, Tensor, list[Tensor]]


def _gradients(found: Iterable[Tensor]) -> Gradients:
    """As the operators return them."""
    of_input, of_h_0, of_c_0, *of_weights = found
    return of_input, of_h_0, of_c_0, of_weights


# --- shapes, for torch.compile, FakeTensor and the meta device ------------------------------------


def _inference_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    return _stack_shapes(*arguments, 1)


def _stack_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    *layer, layers = arguments
    of = LayerArguments(*layer)
    width = of.h_0.shape[0] // layers * of.h_0.shape[2]
    rows = of.input.shape[: 2 if of.batch_sizes is None else 1]
    output = of.h_0.new_empty((*rows, width))
    return output, of.h_0.new_empty(of.h_0.shape), of.h_0.new_empty(of.c_0.shape)


def _forward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
    of = LayerArguments(*arguments)
    rows, (D, _, H) = _rows(of.input.shape, of.batch_sizes), of.c_0.shape
    saved = of.h_0.new_empty((D, rows, 4 * H)), of.h_0.new_empty((D, rows, H))
    return *_inference_shapes(*arguments), *saved


def _backward_shapes(*arguments: Any) -> Gradients:
    of = BackwardArguments(*arguments)
    return _gradients(
        tensor.new_empty(tensor.shape) if need else of.h_0.new_empty((0,))
        for tensor, need in zip(of.differentiable(), of.needs, strict=True)
    )


# --- gradients ------------------------------------------------------------------------------------


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *layer, weights = LayerArguments(*inputs)
    sequence, _, _, gates, cells = output
    ctx.mark_non_differentiable(gates, cells)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(sequence, gates, cells, *layer, *weights)


def _backward(lstm_backward: OpOverload, ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    output, gates, cells, input, batch_sizes, h_0, c_0, *weights = ctx.saved_tensors
    need = LayerArguments(*ctx.needs_input_grad)
    needs = [need.input, need.h_0, need.c_0, *need.weights]
    dy, dh_n, dc_n, *_ = grads  # gates and cells have none
    layer = LayerArguments(input, batch_sizes, h_0, c_0, weights)
    arguments = BackwardArguments(dy, dh_n, dc_n, *layer, output, gates, cells, needs)
    by_reference = transform_under_way() or any(map(_is_batched, (dy, dh_n, dc_n)))
    *states, of_weights = (_backward_by_reference if by_reference else lstm_backward)(*arguments)
    found = (*states, *of_weights)
    wanted = [grad if need else None for grad, need in zip(found, needs, strict=True)]
    return tuple(LayerArguments(wanted[0], None, wanted[1], wanted[2], wanted[3:]))


def _backward_by_reference(*arguments: Any) -> Gradients:
    """`lstm_backward` under vmap, for which it has no batching rule: the Jacobian of what was
    recorded outside."""
    of = BackwardArguments(*arguments)
    with torch.autocast(of.input.device.type, enabled=False):
        found = _reference_gradients(of.cotangents(), of.differentiable(), of.batch_sizes, of.needs)
    return _gradients(of.h_0.new_empty((0,)) if grad is None else grad for grad in found)


# For csrc/autograd.cpp, which calls this kernel, wherever the tensors are.
_from_here = torch.library.Library("fused_lstm", "IMPL")
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
    of = BackwardArguments(*inputs)
    ctx.needs = of.needs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(of.batch_sizes, *of.cotangents(), *of.differentiable())


def _double_backward(ctx: Any, *grad_grads: Any) -> tuple[Any, ...]:
    """Differentiates the backward by differentiating the reference path twice.

    `output`, `gates` and `cells` are functions of the other arguments, and are recomputed: what
    depends on them is in the gradients of those arguments, and they get none of their own.
    """
    batch_sizes, *tensors = ctx.saved_tensors  # three cotangents, then what is differentiable
    need = BackwardArguments(*ctx.needs_input_grad)
    wanted = (*need.cotangents(), *need.differentiable())
    *of_states, of_weights = grad_grads
    cotangents = (*of_states, *of_weights)
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
    dy, dh_n, dc_n, input, h_0, c_0, *weights = grads
    layer = LayerArguments(input, None, h_0, c_0, weights)
    return tuple(BackwardArguments(dy, dh_n, dc_n, *layer, None, None, None, None))


# --- FLOPs, two for each multiplication and addition of the matrix products -----------------------


def _forward_flops(*shapes: Any, **kwargs: Any) -> int:
    *layer, layers = shapes if len(shapes) > len(LayerArguments._fields) else (*shapes, 1)
    of = LayerArguments(*layer)
    through = _multiplied(of.weights, of, of.h_0[0] // layers)
    return 2 * _rows(of.input, of.batch_sizes) * _matrix_elements(through)


def _backward_flops(*shapes: Any, **kwargs: Any) -> int:
    of = BackwardArguments(*shapes)
    each = len(of.weights) // of.h_0[0]
    # w_ih only for dx
    through = [w for k, w in enumerate(of.weights) if k % each != 0 or of.needs[0]]
    needed = [w if need else () for w, need in zip(of.weights, of.needs[3:], strict=True)]
    to_weights = _multiplied(needed, of, of.h_0[0])
    elements = _matrix_elements(through) + _matrix_elements(to_weights)
    return 2 * _rows(of.input, of.batch_sizes) * elements


def _multiplied(weights: Sequence[Any], of: Any, first: int) -> list[Any]:
    """Weights without those w_ih of the `first` that ids pick columns of."""
    of_ids = len(of.input) == (2 if of.batch_sizes is None else 1)
    each = len(weights) // of.h_0[0]
    return [w for k, w in enumerate(weights) if not of_ids or k % each or k >= first * each]


def _rows(input: Sequence[int], batch_sizes: Any) -> int:
    return input[0] * input[1] if batch_sizes is None else input[0]


def _matrix_elements(weights: Sequence[Sequence[int]]) -> int:
    return sum(shape[0] * shape[1] for shape in weights if len(shape) == 2)


# --- all of it, for both --------------------------------------------------------------------------

torch.library.register_fake(lstm_stack_inference)(_stack_shapes)
register_flop_formula(lstm_stack_inference.overloadpacket)(_forward_flops)

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
