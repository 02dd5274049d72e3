"""A stream's steps where the native ones don't serve: on a GPU, as a captured graph on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .functional import States, compute, prepare


@dataclass
class Sizes:
    """The options of a stream's calls, under `torch.nn.LSTM`'s names."""

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    proj_size: int
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    training: bool = False


class Steps:
    """What `_C.Stream` does, by the module's own operators on any device.

    On CUDA a step is captured when it is first taken, and replayed from then on: one launch in
    place of those of each layer.

    Args:
        weights: in the order of the module's, one copy, which forks share.
    """

    def __init__(self, sizes: Sizes, batch_size: int, weights: Sequence[Tensor]) -> None:
        self._sizes = sizes
        self._weights = weights
        P = sizes.proj_size or sizes.hidden_size
        zeros = weights[0].new_zeros
        self._h = zeros(sizes.num_layers, batch_size, P)
        self._c = zeros(sizes.num_layers, batch_size, sizes.hidden_size)
        self._x = zeros(1, batch_size, sizes.input_size)
        self._y = zeros(1, batch_size, P)
        self._advance: Callable[[], None] | None = None

    def step(self, input: Tensor, out: Tensor | None) -> Tensor:
        self._check(input)
        with torch.no_grad():
            if input.dim() == 3:
                y = self._run(input)
            else:
                if self._advance is None:
                    self._advance = self._captured() if input.is_cuda else self._plain()
                self._x.copy_(input)
                self._advance()
                y = self._y[0] if out is not None else self._y[0].clone()
            if out is None:
                return y
            if out.shape != y.shape or out.dtype is not y.dtype:
                raise RuntimeError(
                    f"out must be of size {tuple(y.shape)} and {y.dtype}, "
                    f"got {list(out.shape)} and {out.dtype}"
                )
            return out.copy_(y)

    def _captured(self) -> Callable[[], None]:
        """One step as a graph; the states are then as they were before."""
        before = self.state()
        with torch.cuda.device(self._x.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # handles and workspaces are made outside the capture
                for _ in range(3):
                    self._one()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._one()
        self.set_state(*before)
        return graph.replay

    def _plain(self) -> Callable[[], None]:
        return self._one

    def _one(self) -> None:
        self._y.copy_(self._run(self._x))

    def _run(self, x: Tensor) -> Tensor:
        """(T, B, I) -> (T, B, P); the states move on in their place."""
        with torch.autocast(x.device.type, enabled=False):
            y, h, c = compute(prepare(x, None, (self._h, self._c), self._weights, self._sizes))
        self._h.copy_(h)
        self._c.copy_(c)
        return y

    def _check(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a Tensor, not {type(input).__name__}")
        if input.device != self._x.device:
            raise RuntimeError(
                f"the stream's weights are on {self._x.device}, input is on {input.device}"
            )
        if input.dtype is not self._x.dtype:
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({self._x.dtype}). "
                f"Convert input: input.to({self._x.dtype})"
            )
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        for dim, what, expected in (
            (-1, "input_size", self._x.shape[2]),
            (-2, "the stream's batch_size", self._x.shape[1]),
        ):
            if input.shape[dim] != expected:
                raise RuntimeError(
                    f"input.size({dim}) must be equal to {what}. "
                    f"Expected {expected}, got {input.shape[dim]}"
                )

    def fork(self) -> Steps:
        other = Steps(self._sizes, self._x.shape[1], self._weights)
        other._h.copy_(self._h)
        other._c.copy_(self._c)
        return other

    def pack(self, weights: Sequence[Tensor]) -> None:
        self._weights = weights
        self._advance = None  # a graph has the addresses of those before

    def reset(self, rows: Sequence[int] | None) -> None:
        B = self._x.shape[1]
        for row in rows or ():
            if not 0 <= row < B:
                raise IndexError(f"row {row} of a batch of {B}")
        for state in (self._h, self._c):
            if rows is None:
                state.zero_()
            else:
                state[:, list(rows)] = 0

    def state(self) -> States:
        return self._h.clone(), self._c.clone()

    def set_state(self, h_0: Tensor, c_0: Tensor) -> None:
        for at, (to, given) in enumerate(((self._h, h_0), (self._c, c_0))):
            if given.shape != to.shape:
                raise RuntimeError(
                    f"Expected hidden[{at}] size {tuple(to.shape)}, got {list(given.shape)}"
                )
            if given.dtype is not to.dtype:
                name = "hc"[at]
                raise ValueError(f"{name}_0 must be of dtype {to.dtype}, got {given.dtype}")
        self._h.copy_(h_0)
        self._c.copy_(c_0)

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights)

    @property
    def state_bytes(self) -> int:
        return self._h.nbytes + self._c.nbytes
