"""A stack of LSTM layers with the options of `torch.nn.LSTM`, on top of one layer's operators.

`prepare` checks a call and computes nothing: autocast's dtypes, and whether nn.LSTM's own code is
to answer. `compute` does the rest: layers, dropout between them, what their results are cast to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autocast import Dtypes, dtypes_of_stock
from .backends import KERNEL_DTYPES, choose
from .ops import OPERATORS, RECORDED, lstm_stack_inference, transform_under_way
from .reference import lstm_layer

_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing  # torch.jit's

_strided = torch.strided  # a look-up in torch costs as much as reading the layout

States = tuple[Tensor, Tensor]


class Refusal(Exception):
    """Why `torch.nn.LSTM`'s own code is to answer a call: it says what is wrong, or does what it
    does."""


class Options(Protocol):
    """Those of `torch.nn.LSTM`, under its names."""

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    training: bool


@dataclass(slots=True)  # made in half the time of a named tuple
class Call:
    """A call that has been checked."""

    input: Tensor  # (T, B, I), or packed rows (N, I); without I: ids (lookup.py)
    batch_sizes: Tensor | None  # (T,) of packed rows
    hx: States | None  # (L*D, B, P) and (L*D, B, H); None: zeros
    weights: Sequence[Tensor]
    options: Options
    directions: int  # D
    h_size: int  # P
    batch: int  # B
    batch_dim: int | None  # of the input as it was given; None: it had none
    dtype: torch.dtype  # that it is computed in
    results: Sequence[torch.dtype] | None  # of output, h_n, c_n where autocast decides


def prepare(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: States | None,
    weights: Sequence[Tensor],
    options: Options,
) -> Call:
    """Checks a call; nothing is computed.

    Args:
        input: (T, I), (T, B, I), (B, T, I) with `batch_first`, or packed rows (N, I) when
            `batch_sizes` is given.
        batch_sizes: None, or (T,) int64 on the CPU, non-increasing: the rows of each step.
        hx: h_0 (L*D, B, P) and c_0 (L*D, B, H), both without B for an input without; None: zeros.
        weights: for each of L layers, for each of D directions: w_ih (4H, I or D*P), w_hh (4H, P),
            then with `bias` b_ih (4H), b_hh (4H), and with `proj_size` w_hr (P, H).

    Raises:
        Refusal: an argument is not what is said above.
        RuntimeError: a weight has the wrong shape (`torch.nn.LSTM` may read past its end).
    """
    directions = 2 if options.bidirectional else 1
    states = options.num_layers * directions
    hidden_size, proj_size = options.hidden_size, options.proj_size
    h_size = proj_size or hidden_size
    expected = states * (2 + 2 * options.bias + (proj_size > 0))
    if len(weights) != expected:
        raise Refusal(f"there are {len(weights)} weights, not {expected} as for its options")
    check_weight_shapes(weights, options, h_size, directions)
    input, batch, batch_dim = _time_first(input, batch_sizes, hx, options)
    tensors = [input, *weights]
    if hx is not None:
        batched = batch_dim is not None
        hx = _states(hx, batched, (states, batch, h_size), (states, batch, hidden_size))
        tensors += hx

    dtype = other = input.dtype
    device = input.device
    for tensor in tensors:
        if tensor.device != device:
            raise Refusal(f"the input is on {device}, a state or weight on {tensor.device}")
        if tensor.layout is not _strided:
            raise Refusal(f"a tensor's layout is {tensor.layout}")
        if tensor.dtype is not dtype:
            other = tensor.dtype
    call = Call(
        input, batch_sizes, hx, weights, options, directions, h_size, batch, batch_dim, dtype, None
    )
    if _any_autocast_enabled() and torch.is_autocast_enabled(device.type):
        dtypes = _autocast_dtypes(call)
        if dtypes is None:
            raise Refusal("it refuses these dtypes under autocast")
        call.dtype, *of_results = dtypes
        call.results = of_results
        return call
    if other is not dtype:
        raise Refusal(f"the input is {dtype}, a state or weight {other}")
    if dtype not in KERNEL_DTYPES and not dtype.is_complex:
        raise Refusal(f"there is no LSTM in {dtype}")
    return call


def compute(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """output, h_n, c_n, as `torch.nn.LSTM` shapes them.

    Raises:
        RuntimeError: a backend is forced that can't serve the call.
    """
    layers = _layers_function(call)
    if call.results is None:
        output, h_n, c_n = layers(call)
    else:
        with torch.autocast(call.input.device.type, enabled=False):
            _cast(call)
            found = layers(call)
            output, h_n, c_n = map(Tensor.to, found, call.results)
    if call.batch_dim is None:
        return output.squeeze(1), h_n.squeeze(1), c_n.squeeze(1)
    if call.batch_dim == 0:
        output = output.transpose(0, 1)
    return output, h_n, c_n


def transform() -> str | None:
    """What is under way that needs the reference path: torch.library's autograd formulas give zero
    tangents under forward-mode AD, and fail under torch.func."""
    if transform_under_way():
        return "torch.func"
    return "forward-mode AD" if forward_ad._current_level >= 0 else None


def is_recorded(call: Call) -> bool:
    """Whether the call is recorded for a backward."""
    # torch.jit.trace compares its trace with one made without gradients, and wants the same.
    if not torch.is_grad_enabled() and (_is_compiling() or not _is_tracing()):
        return False
    return (
        call.input.requires_grad
        or any(weight.requires_grad for weight in call.weights)
        or (call.hx is not None and (call.hx[0].requires_grad or call.hx[1].requires_grad))
    )


def is_stack(call: Call) -> bool:
    """Whether one operator could compute all layers: nothing is recorded, or done between them."""
    options = call.options
    dropped = options.training and options.dropout
    return options.num_layers > 1 and not dropped and not is_recorded(call)


def _layers_function(call: Call) -> Callable[[Call], tuple[Tensor, Tensor, Tensor]]:
    """What computes all layers of this call."""
    backend = choose(call.input, call.dtype, transform())
    layer: Callable[..., Any] = lstm_layer
    if backend == "cpu" and is_stack(call):
        return _stack
    if backend != "reference":
        if not is_recorded(call):
            layer = OPERATORS[backend].lstm_inference
        elif _is_compiling() or _is_tracing():
            layer = OPERATORS[backend].lstm_forward
        else:
            layer = RECORDED[backend]
    return partial(_layers, layer)


def first_w_ih(call: Call) -> range:
    """Where its weights have those of the first layer that multiply the input."""
    each = len(call.weights) // (call.options.num_layers * call.directions)
    return range(0, each * call.directions, each)


def _cast(call: Call) -> None:
    """All its tensors to the dtype that it is computed in, but for ids and their tables."""
    dtype = call.dtype
    of_ids = call.input.dtype is torch.int64
    tables = first_w_ih(call) if of_ids else range(0)
    call.input = call.input if of_ids else call.input.to(dtype)
    if call.hx is not None:
        call.hx = (call.hx[0].to(dtype), call.hx[1].to(dtype))
    call.weights = [w if k in tables else w.to(dtype) for k, w in enumerate(call.weights)]


def _stack(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """All layers by one operator."""
    layers = call.options.num_layers
    h_0, c_0 = call.hx or _zero_states(call, layers * call.directions)
    found: tuple[Tensor, Tensor, Tensor] = lstm_stack_inference(
        call.input, call.batch_sizes, h_0, c_0, call.weights, layers
    )
    return found


def _zero_states(call: Call, count: int) -> States:
    like = call.weights[1] if call.input.dtype is torch.int64 else call.input
    c_0 = like.new_zeros((count, call.batch, call.options.hidden_size))
    if call.h_size == call.options.hidden_size:
        return c_0, c_0
    return like.new_zeros((count, call.batch, call.h_size)), c_0


def _layers(layer: Callable[..., Any], call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The layers one after the other: one operator call for each, both directions in it."""
    input, batch_sizes, hx, weights = call.input, call.batch_sizes, call.hx, call.weights
    D, layers = call.directions, call.options.num_layers
    if hx is None:
        h_l, c_l = _zero_states(call, D)
    elif layers == 1:
        h_l, c_l = hx
    if layers == 1:
        return layer(input, batch_sizes, h_l, c_l, weights)[:3]

    dropout = call.options.dropout if call.options.training else 0.0
    each = len(weights) // layers
    h_n, c_n = [], []
    for index in range(layers):
        if hx is not None:
            h_l = hx[0].narrow(0, index * D, D)
            c_l = hx[1].narrow(0, index * D, D)
        if index > 0 and dropout:
            input = torch.dropout(input, dropout, True)
        input, h, c, *_ = layer(
            input, batch_sizes, h_l, c_l, weights[index * each : (index + 1) * each]
        )
        h_n.append(h)
        c_n.append(c)
    return input, torch.cat(h_n), torch.cat(c_n)


def check_weight_shapes(
    weights: Sequence[Tensor], options: Options, h_size: int, directions: int
) -> None:
    gates, layers = 4 * options.hidden_size, options.num_layers
    each = len(weights) // (layers * directions)
    biased, projected = each // 2 * 2, each % 2
    shapes = [(gates, options.input_size), (gates, h_size), (gates,), (gates,)][:biased]
    if projected:
        shapes.append((h_size, options.hidden_size))
    if directions == 2:
        shapes *= 2
    if layers > 1:
        above = [(gates, directions * h_size), *shapes[1:each]]
        shapes += above * (directions * (layers - 1))
    # All at once, for one by one takes as long again.
    if [weight.shape for weight in weights] == shapes:
        return
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[:biased]
    kinds += ("weight_hr",) * projected
    for index, (weight, shape) in enumerate(zip(weights, shapes, strict=True)):
        if weight.shape != shape:
            place, kind = divmod(index, len(kinds))
            layer, direction = divmod(place, directions)
            raise RuntimeError(
                f"{kinds[kind]}_l{layer}{'_reverse' * direction} must have the shape {shape}, "
                f"got {tuple(weight.shape)}"
            )


def _time_first(
    input: Tensor, batch_sizes: Tensor | None, hx: States | None, options: Options
) -> tuple[Tensor, int, int | None]:
    """The input as (T, B, I) or packed rows, B, and the dimension that B was in."""
    dim = input.dim()
    batch_dim: int | None = 1
    if batch_sizes is not None:
        if dim != 2:
            raise Refusal(f"packed rows have 2 dimensions, and these {dim}")
        rows, features = input.shape
        batch = _packed_batch(rows, batch_sizes, hx)
    else:
        if dim == 2:
            input, batch_dim = input.unsqueeze(1), None
        elif dim != 3:
            raise Refusal(f"the input has {dim} dimensions, not 2 or 3")
        elif options.batch_first:
            input, batch_dim = input.transpose(0, 1), 0
        steps, batch, features = input.shape
        if steps == 0:
            raise Refusal("the input has no steps")
    if features != options.input_size:
        raise Refusal(f"the input has {features} features, not {options.input_size}")
    return input, batch, batch_dim


def _states(
    hx: States, batched: bool, h_shape: tuple[int, ...], c_shape: tuple[int, ...]
) -> States:
    """h_0 and c_0 with a batch dimension."""
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise Refusal("hx is not a pair (h_0, c_0)")
    h_0, c_0 = hx
    if not isinstance(h_0, Tensor) or not isinstance(c_0, Tensor):
        raise Refusal("h_0 and c_0 are not both tensors")
    if not batched:
        if h_0.dim() != 2 or c_0.dim() != 2:
            raise Refusal("h_0 and c_0 are not both of 2 dimensions, as the input is")
        h_0, c_0 = h_0.unsqueeze(1), c_0.unsqueeze(1)
    if h_0.shape != h_shape:
        raise Refusal(f"h_0 is {tuple(h_0.shape)}, where (L*D, B, P) is {h_shape}")
    if c_0.shape != c_shape:
        raise Refusal(f"c_0 is {tuple(c_0.shape)}, where (L*D, B, H) is {c_shape}")
    return h_0, c_0


def _packed_batch(rows: int, batch_sizes: Tensor, hx: States | None) -> int:
    """The number of sequences in a packed batch."""
    if not isinstance(batch_sizes, Tensor) or batch_sizes.dim() != 1:
        raise Refusal("batch_sizes is not a tensor of one dimension")
    if batch_sizes.dtype is not torch.int64 or not batch_sizes.is_cpu:
        raise Refusal("batch_sizes is not int64 on the CPU")
    if _is_compiling():  # the values are not known while tracing; the kernels check them again
        return hx[0].shape[-2] if hx is not None else int(batch_sizes[0])
    sizes = batch_sizes.tolist()
    if not sizes or sizes[-1] <= 0 or sum(sizes) != rows or sizes != sorted(sizes, reverse=True):
        raise Refusal(f"batch_sizes must be positive, never increase and sum to the {rows} rows")
    return sizes[0]


def _autocast_dtypes(call: Call) -> Dtypes | None:
    """The dtypes that `torch.nn.LSTM` has under autocast; None where it refuses the call."""
    input, weights, device = call.input, call.weights, call.input.device
    h_0, c_0 = call.hx or (input, input)
    found = {input.dtype, h_0.dtype, c_0.dtype, *(weight.dtype for weight in weights)}
    if not found <= KERNEL_DTYPES:
        return None
    dtype = torch.get_autocast_dtype(device.type)
    if not input.is_cpu:
        if torch.float64 in found:  # which autocast leaves alone
            return (torch.float64,) * 4 if len(found) == 1 else None
        if dtype is torch.float16 or not input.is_cuda:
            return dtype, dtype, dtype, dtype
    each = len(weights) // (call.options.num_layers * call.directions)
    packed = equal = call.batch_sizes is not None
    if call.batch_sizes is not None:
        # Whether all are as long as each other is not known while tracing: taken for no.
        rows = call.batch_sizes.shape[0] * call.batch
        equal = not _is_compiling() and input.shape[0] == rows
    return dtypes_of_stock(
        kind=device.type,
        number=device.index,
        autocast=dtype,
        input=input.dtype,
        h_0=h_0.dtype,
        c_0=c_0.dtype,
        weights=tuple(weight.dtype for weight in weights[:each]),
        several_layers=len(weights) > 2 * each,
        bias=each >= 4,
        packed=packed,
        equal_lengths=equal,
        projected=each % 2 == 1,
        empty=input.numel() == 0,
        training=call.options.training,
        gradients=torch.is_grad_enabled(),
    )
