"""Ids in place of the rows of an embedding that they name.

x W_ih^T takes 4H * I multiplications for every row of the input. Of an embedding E of V rows there
are only V different ones: E W_ih^T is computed once, by torch, and the kernel takes rows of it, as
if the input were one-hot and W_ih were W_ih E^T. The backward adds rows of dgates where it would
multiply them for dW_ih and dx, and torch's gradients of that product do the rest. In 16 bits and
under autocast that product stays in float32, as nn.LSTM's sums do.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.rnn import PackedSequence

from .backends import KERNEL_DTYPES, choose
from .functional import Call, first_w_ih, transform
from .reference import dtype_of_sums

# Rows of the embedding: a block's part of the table, 128 to 256 bytes a row, is to stay in a cache.
MOST_ROWS = 1024
# Steps and sequences for each of them: below, the table costs as much as it saves. In 16 bits AMX
# multiplies some ten times as fast as torch makes the table, but there is more that it saves.
LEAST_USES = {8: 2, 4: 2, 2: 8}  # by the bytes of a number

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Ids:
    """Ids of rows of a matrix (V, I), which nobody has looked up."""

    ids: Tensor  # (T, B), (B, T), (T,), or (N,) of a packed sequence
    matrix: Tensor

    def rows(self) -> Tensor:
        return functional.embedding(self.ids, self.matrix)

    def give(self, call: Call) -> None:
        """To a call that was prepared with rows in their place."""
        dtype, weights = dtype_of_sums(call.dtype), list(call.weights)
        with torch.autocast("cpu", enabled=False):
            columns = self.matrix.to(dtype).t()
            for w_ih in first_w_ih(call):
                weights[w_ih] = weights[w_ih].to(dtype) @ columns
        call.weights, call.input = weights, self.ids
        if call.batch_sizes is None and call.batch_dim != 1:
            only_one = call.batch_dim is None
            call.input = self.ids.unsqueeze(1) if only_one else self.ids.transpose(0, 1)


def look_up(input: Any, embedding: nn.Module | Tensor) -> tuple[Any, Ids | None]:
    """The rows that ids name; or rows of that shape without meaning, and the ids, where the kernel
    looks them up.

    Args:
        input: ids, a tensor or a `PackedSequence` of them.
        embedding: (V, I), or a module that makes rows of ids.
    """
    packed = isinstance(input, PackedSequence)
    ids: Tensor = input.data if packed else input
    matrix = _matrix(embedding)
    found = None
    if matrix is not None and _refusal(ids, matrix) is None:
        found = Ids(ids, matrix)
        rows = matrix.detach()[0].expand(*ids.shape, matrix.shape[1])
    elif isinstance(embedding, nn.Module):
        rows = embedding(ids)
    else:
        rows = functional.embedding(ids, embedding)
    return (PackedSequence(rows, *input[1:]) if packed else rows), found


def refusal(input: Any, embedding: nn.Module | Tensor) -> str | None:
    """Why torch looks up the rows; None where the kernel does."""
    matrix = _matrix(embedding)
    if matrix is None:
        return "the embedding does more than look up rows"
    return _refusal(input.data if isinstance(input, PackedSequence) else input, matrix)


def _matrix(embedding: nn.Module | Tensor) -> Tensor | None:
    """Its rows, where looking them up is all that it does."""
    if isinstance(embedding, Tensor):
        return embedding
    if type(embedding) is not nn.Embedding:
        return None
    plain = (
        embedding.padding_idx is None
        and embedding.max_norm is None
        and not (embedding.scale_grad_by_freq or embedding.sparse)
        and "forward" not in embedding.__dict__
        and not any(getattr(embedding, hooks) for hooks in _HOOKS)
        and not _has_any_global_hook()
    )
    return embedding.weight if plain else None


def _refusal(ids: Tensor, matrix: Tensor) -> str | None:
    if ids.dtype is not torch.int64 or not ids.is_cpu:
        return "the ids are not int64 on the CPU"
    if matrix.dim() != 2 or matrix.dtype not in KERNEL_DTYPES or not matrix.is_cpu:
        return "the embedding is no matrix of floating-point numbers on the CPU"
    if not 0 < matrix.shape[0] <= MOST_ROWS:
        return f"the embedding has more than {MOST_ROWS} rows, or none"
    uses = LEAST_USES[2 if torch.is_autocast_enabled("cpu") else matrix.itemsize]
    if uses * matrix.shape[0] > ids.numel():
        return f"there are fewer than {uses} ids for each row of the embedding"
    if choose(matrix, matrix.dtype, transform()) != "cpu":
        return "the CPU's kernels don't serve this call"
    return None
