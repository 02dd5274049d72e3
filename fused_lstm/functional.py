"""`lstm(...)`: checks, autocast, layers and directions, dropout between layers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autocast import Dtypes, dtypes_of_stock
from .backends import KERNEL_DTYPES, choose
from .ops import OPERATORS, RECORDED, transform_under_way
from .reference import lstm_layer

_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_compiling = torch.compiler.is_compiling

States = tuple[Tensor, Tensor]


def lstm(
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: States | None,
    weights: Sequence[Tensor],
    *,
    input_size: int,
    hidden_size: int,
    num_layers: int,
    bias: bool,
    batch_first: bool,
    dropout: float,
    bidirectional: bool,
    proj_size: int,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A stack of LSTM layers with the options of `torch.nn.LSTM`.

    Args:
        input: (T, I), (T, B, I), (B, T, I) with `batch_first`, or packed rows (N, I) when
            `batch_sizes` is given.
        batch_sizes: None, or (T,) int64 on the CPU, non-increasing: the rows of each step.
        hx: h_0 (L*D, B, P) and c_0 (L*D, B, H), both without B for an input without; None: zeros.
        weights: for each of L layers, for each of D directions: w_ih (4H, I or D*P), w_hh (4H, P),
            then with `bias` b_ih (4H), b_hh (4H), and with `proj_size` w_hr (P, H).

    Returns:
        output, h_n, c_n, as `torch.nn.LSTM` shapes them; or None when an argument is not what is
        said above: `torch.nn.LSTM`'s own code is then to say what is wrong with it.

    Raises:
        RuntimeError: a weight has the wrong shape (`torch.nn.LSTM` may read past its end), or a
            backend is forced that can't serve the call.
    """
    directions = 2 if bidirectional else 1
    h_size = proj_size or hidden_size
    states = num_layers * directions
    if len(weights) != states * (2 + 2 * bias + (proj_size > 0)):
        return None
    _check_weight_shapes(weights, input_size, hidden_size, h_size, num_layers, directions)

    # Time-major: (T, B, I), or packed rows (N, I).
    dim = input.dim()
    batched = True
    batch: int | None
    if batch_sizes is not None:
        if dim != 2:
            return None
        rows, features = input.shape
        batch = _packed_batch(rows, batch_sizes, hx)
    else:
        if dim == 2:
            batched = False
            input = input.unsqueeze(1)
        elif dim != 3:
            return None
        elif batch_first:
            input = input.transpose(0, 1)
        steps, batch, features = input.shape
        if steps == 0:
            return None
    if batch is None or features != input_size:
        return None

    h_0 = c_0 = None
    tensors = [input, *weights]
    if hx is not None:
        found = _states(hx, batched, (states, batch, h_size), (states, batch, hidden_size))
        if found is None:
            return None
        h_0, c_0 = found
        tensors += found
    dtype, device = input.dtype, input.device
    for tensor in tensors:
        if tensor.device != device or tensor.layout is not torch.strided:
            return None

    sizes = (batch, hidden_size, h_size, num_layers, directions)
    dropout = dropout if training else 0.0
    if _any_autocast_enabled() and torch.is_autocast_enabled(device.type):
        each = len(weights) // states
        given = None if h_0 is None or c_0 is None else (h_0, c_0)
        packed = batch_sizes is not None
        # Whether all are as long as each other is not known while tracing: taken for no.
        lengths = None if batch_sizes is None or _is_compiling() else batch_sizes.shape[0]
        equal = lengths is not None and rows == lengths * batch
        dtypes = _autocast_dtypes(input, given, weights, each, (packed, equal), training)
        if dtypes is None:
            return None
        dtype, *of_results = dtypes
        with torch.autocast(device.type, enabled=False):
            output, h_n, c_n = _layers(
                input.to(dtype),
                batch_sizes,
                None if h_0 is None else h_0.to(dtype),
                None if c_0 is None else c_0.to(dtype),
                [weight.to(dtype) for weight in weights],
                sizes,
                dropout,
            )
            output, h_n, c_n = map(Tensor.to, (output, h_n, c_n), of_results)
    else:
        for tensor in tensors:
            if tensor.dtype is not dtype:
                return None
        if dtype not in KERNEL_DTYPES and not dtype.is_complex:
            return None
        output, h_n, c_n = _layers(input, batch_sizes, h_0, c_0, weights, sizes, dropout)

    if not batched:
        return output.squeeze(1), h_n.squeeze(1), c_n.squeeze(1)
    if batch_first and batch_sizes is None:
        output = output.transpose(0, 1)
    return output, h_n, c_n


def _layers(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor | None,
    c_0: Tensor | None,
    weights: Sequence[Tensor],
    sizes: tuple[int, int, int, int, int],
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The layers one after the other: one operator call for each, both directions in it."""
    batch, hidden_size, h_size, num_layers, directions = sizes
    layer = _layer_function(input, h_0, c_0, weights)
    if h_0 is None or c_0 is None:
        c_l = input.new_zeros((directions, batch, hidden_size))
        h_l = c_l if h_size == hidden_size else input.new_zeros((directions, batch, h_size))
    elif num_layers == 1:
        h_l, c_l = h_0, c_0
    if num_layers == 1:
        output, h, c, *_ = layer(input, batch_sizes, h_l, c_l, weights)
        return output, h, c

    each = len(weights) // num_layers
    h_n, c_n = [], []
    for index in range(num_layers):
        if h_0 is not None and c_0 is not None:
            h_l = h_0.narrow(0, index * directions, directions)
            c_l = c_0.narrow(0, index * directions, directions)
        if index > 0 and dropout:
            input = torch.dropout(input, dropout, True)
        input, h, c, *_ = layer(
            input, batch_sizes, h_l, c_l, weights[index * each : (index + 1) * each]
        )
        h_n.append(h)
        c_n.append(c)
    return input, torch.cat(h_n), torch.cat(c_n)


def _layer_function(
    input: Tensor, h_0: Tensor | None, c_0: Tensor | None, weights: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, ...]]:
    """What computes one layer of this call."""
    # torch.library's autograd formulas give zero tangents under forward-mode AD and fail under
    # torch.func, so both take the reference path.
    backend = choose(input, forward_ad._current_level >= 0 or transform_under_way())
    if backend == "reference":
        return lstm_layer
    # torch.jit.trace compares its trace with one made without gradients, and wants the same.
    if (torch.is_grad_enabled() or torch.jit.is_tracing()) and (
        input.requires_grad
        or any(weight.requires_grad for weight in weights)
        or (h_0 is not None and h_0.requires_grad)
        or (c_0 is not None and c_0.requires_grad)
    ):
        if _is_compiling() or torch.jit.is_tracing():
            return OPERATORS[backend].lstm_forward
        return RECORDED[backend]
    return OPERATORS[backend].lstm_inference


def _check_weight_shapes(
    weights: Sequence[Tensor],
    input_size: int,
    hidden_size: int,
    h_size: int,
    num_layers: int,
    directions: int,
) -> None:
    each = len(weights) // (num_layers * directions)
    gates = 4 * hidden_size
    shapes = [(gates, input_size), (gates, h_size), (gates,), (gates,)][: each // 2 * 2]
    if each % 2:
        shapes.append((h_size, hidden_size))
    index = 0
    for layer in range(num_layers):
        if layer == 1:
            shapes[0] = (gates, directions * h_size)
        for direction in range(directions):
            for shape in shapes:
                if weights[index].shape != shape:
                    kind = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: each // 2 * 2]
                    name = (*kind, "weight_hr")[index % each]
                    raise RuntimeError(
                        f"{name}_l{layer}{'_reverse' * direction} must have the shape {shape}, "
                        f"got {tuple(weights[index].shape)}"
                    )
                index += 1


def _states(
    hx: States, batched: bool, h_shape: tuple[int, ...], c_shape: tuple[int, ...]
) -> States | None:
    """h_0 and c_0 with a batch dimension, or None if they aren't two tensors of these shapes."""
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        return None
    h_0, c_0 = hx
    if not isinstance(h_0, Tensor) or not isinstance(c_0, Tensor):
        return None
    if not batched:
        if h_0.dim() != 2 or c_0.dim() != 2:
            return None
        h_0, c_0 = h_0.unsqueeze(1), c_0.unsqueeze(1)
    return (h_0, c_0) if h_0.shape == h_shape and c_0.shape == c_shape else None


def _packed_batch(rows: int, batch_sizes: Tensor, hx: States | None) -> int | None:
    """The number of sequences in a packed batch, or None if `batch_sizes` isn't right."""
    if not isinstance(batch_sizes, Tensor) or batch_sizes.dim() != 1:
        return None
    if batch_sizes.dtype is not torch.int64 or not batch_sizes.is_cpu:
        return None
    if _is_compiling():  # the values are not known while tracing; the kernels check them again
        return hx[0].shape[-2] if hx is not None else int(batch_sizes[0])
    sizes = batch_sizes.tolist()
    if not sizes or sizes[-1] <= 0 or sum(sizes) != rows or sizes != sorted(sizes, reverse=True):
        return None
    return sizes[0]


def _autocast_dtypes(
    input: Tensor,
    hx: States | None,
    weights: Sequence[Tensor],
    each: int,
    packed: tuple[bool, bool],
    training: bool,
) -> Dtypes | None:
    """The dtypes that `torch.nn.LSTM` has under autocast; None where it refuses the call.

    Args:
        input, hx, weights: of the call.
        each: the number of weights of one layer and direction.
        packed: whether the input is, and whether its sequences are then all of one length.
        training: the module's flag.
    """
    h_0, c_0 = hx or (input, input)
    found = {input.dtype, h_0.dtype, c_0.dtype, *(weight.dtype for weight in weights)}
    if not found <= KERNEL_DTYPES:
        return None
    dtype = torch.get_autocast_dtype(input.device.type)
    if not input.is_cpu:
        if torch.float64 in found:  # which autocast leaves alone
            return (torch.float64,) * 4 if len(found) == 1 else None
        if dtype is torch.float16 or not input.is_cuda:
            return dtype, dtype, dtype, dtype
    return dtypes_of_stock(
        input.device.type,
        input.device.index,
        dtype,
        input.dtype,
        h_0.dtype,
        c_0.dtype,
        tuple(weight.dtype for weight in weights[:each]),
        len(weights) > 2 * each,
        each >= 4,
        *packed,
        each % 2 == 1,
        input.numel() == 0,
        training,
        torch.is_grad_enabled(),
    )
