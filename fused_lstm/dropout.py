"""`Dropout`: torch's, with a mask that a CPU draws in a twentieth of the time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _C
from .backends import KERNEL_DTYPES, forced, refusal
from .functional import transform


class Dropout(nn.Dropout):
    """A drop-in for `torch.nn.Dropout`.

    On a CPU an eager call draws one number from torch's generator, and the mask from it by
    Philox4x32 with 7 rounds (Salmon et al., 2011), 16 bits an element: an element is kept with the
    multiple of 2^-16 that is next to 1 - p. The mask is the same for any number of threads, and
    another than `nn.Dropout`'s from the same seed. Elsewhere, inside torch.compile or torch.func,
    and in place it is `nn.Dropout` itself. `FusedLSTM`'s own dropout, between its layers, draws
    what nn.LSTM's does.

    Args:
        p: probability of zeroing an element.
        inplace: whether to write over the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Any shape; float32, float64, bfloat16 or float16 for the quick mask."""
        if not (self.training and 0 < self.p < 1) or self.inplace or not _is_served(input):
            return super().forward(input)
        mask = torch.empty_like(input)
        _C.fill_mask(mask, 1 - self.p, int(torch.empty((), dtype=torch.int64).random_()))
        return input * mask


def _is_served(input: Tensor) -> bool:
    if not input.is_cpu or input.dtype not in KERNEL_DTYPES or torch.compiler.is_compiling():
        return False
    if type(input) not in (Tensor, nn.Parameter) or forced() not in (None, "cpu"):
        return False
    return refusal("cpu", input, input.dtype, transform()) is None
