"""The dtypes of `torch.nn.LSTM` under autocast: asked of nn.LSTM, not written down.

On the CPU they differ with the processor and with torch's version: where oneDNN serves a call all
results are in the autocast dtype; elsewhere nn.LSTM is a composition of operators, of which
autocast takes the products only. Which of the two a call takes depends on its dtypes, on gradients,
and on what oneDNN offers on this processor. On a GPU torch (2.11) casts to float16 for cuDNN,
whatever dtype autocast was given, and to that dtype where it does without cuDNN. So the smallest
call of each kind is made, once.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Question(NamedTuple):
    """Everything that the dtypes of nn.LSTM's results depend on, under autocast."""

    kind: str  # of the device
    number: int | None  # which of its kind; None for the CPU
    autocast: torch.dtype
    input: torch.dtype
    h_0: torch.dtype  # the input's where no states are given
    c_0: torch.dtype
    weights: tuple[torch.dtype, ...]  # of one layer and direction
    several_layers: bool
    bias: bool
    packed: bool
    equal_lengths: bool  # of a packed batch: oneDNN serves it like one that isn't packed
    projected: bool
    empty: bool  # no sequences
    training: bool
    gradients: bool  # torch.is_grad_enabled()
    library: bool  # torch.backends.mkldnn's flag, or cudnn's


# What the products are computed in; output's, h_n's and c_n's dtype.
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]


# Not traced: torch.compile takes the answer as it is, and guards on what it depends on.
@torch.compiler.assume_constant_result
def dtypes_of_stock(**fields: Any) -> Dtypes | None:
    """The dtypes that nn.LSTM has for a `Question` of these fields, all but `library`; None where
    it refuses the call.

    Where oneDNN has no code for the autocast dtype on this processor, nn.LSTM fails with "could not
    create a primitive descriptor"; the dtypes are then those where it has: autocast's for all.
    """
    on_cpu = fields["kind"] == "cpu"
    enabled = torch._C._get_mkldnn_enabled if on_cpu else torch._C._get_cudnn_enabled
    return _asked(Question(**fields, library=enabled()))


@lru_cache(maxsize=1024)
def _asked(question: Question) -> Dtypes | None:
    everything = {question.input, question.h_0, question.c_0, *question.weights}
    # autocast leaves float64 alone
    products = torch.float64 if everything == {torch.float64} else question.autocast
    if question.kind == "cuda" and not torch.cuda.is_available():  # a FakeTensor's
        return products, products, products, products
    # Neither fake tensors, nor a trace, nor a transform is to see this call.
    with (
        _disable_current_modes(),
        torch._C._DisableFuncTorch(),
        torch.autocast(question.kind, question.autocast),
        torch.set_grad_enabled(question.gradients),
    ):
        try:
            found = _smallest(question)
        except RuntimeError as error:
            if "could not create a primitive" not in str(error):
                return None
            return products, products, products, products
    output, h_n, c_n = (tensor.dtype for tensor in found)
    return output if question.kind == "cuda" else products, output, h_n, c_n


def _smallest(question: Question) -> tuple[Tensor, ...]:
    """What nn.LSTM returns for the smallest call of this kind; no random number is drawn."""
    layers, H, P = 1 + question.several_layers, 2, 1 if question.projected else 2
    B = 0 if question.empty else 1 if question.equal_lengths or not question.packed else 2
    of_kind = "" if question.number is None else f":{question.number}"
    device = torch.device(question.kind + of_kind)

    def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    weights: list[Tensor] = []
    for layer in range(layers):
        shapes = [(4 * H, P if layer else 1), (4 * H, P), *[(4 * H,)] * 2 * question.bias]
        shapes += [(P, H)] * question.projected
        weights += map(zeros, shapes, question.weights)
    states = [zeros((layers, B, P), question.h_0), zeros((layers, B, H), question.c_0)]
    options = (question.bias, layers, 0.0, question.training, False)
    if question.packed:
        sizes = torch.tensor([B, 1])
        return torch.lstm(zeros((B + 1, 1), question.input), sizes, states, weights, *options)
    return torch.lstm(zeros((2, B, 1), question.input), states, weights, *options, False)
