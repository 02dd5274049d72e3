"""`Stream`: an LSTM one step at a time, for whoever serves it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _C
from .backends import KERNEL_DTYPES, choose
from .functional import States, check_weight_shapes
from .steps import Sizes, Steps

if TYPE_CHECKING:
    from .module import FusedLSTM

# Narrower than the dtype that is computed in, and for which of those.
NARROWER = {
    torch.bfloat16: {torch.float32},
    torch.int8: {torch.float32, torch.bfloat16, torch.float16},
}


class Stream:
    """Steps of a `FusedLSTM`, its weights packed once and its states kept from call to call.

    `FusedLSTM.stream` makes one. What it holds is a copy of the weights as they were then:
    `refresh` takes them anew. There are no gradients and no dropout. In float32 and float64 a step
    gives the bits that the module gives when it is called with one step. Threads may each have a
    stream; one that is called by two at once raises RuntimeError.

    On the CPU a step is one native call. Elsewhere it is the module's own, captured on CUDA into a
    graph when it is first taken, and the bits are those that it gives there.

    Args:
        lstm: the module, in one direction.
        batch_size: B, the sequences that go on side by side.
        dtype: of what goes in and comes out, and of the sums where that is wider than 16 bits:
            float32, float64, bfloat16, float16. The parameters' if not given.
        weights: the dtype that the weights are kept in, which a small step does little but read.
            bfloat16 (for a float32 stream), or int8, symmetric with a scale a row (not for
            float64), on the CPU; biases, states and sums stay as they are. `dtype` if not given.

    Raises:
        ValueError: the module has two directions, or no stream has this dtype or these weights.
        RuntimeError: a parameter has the wrong shape, or a backend is forced that can't serve it.
    """

    def __init__(
        self,
        lstm: FusedLSTM,
        batch_size: int = 1,
        *,
        dtype: torch.dtype | None = None,
        weights: torch.dtype | None = None,
    ) -> None:
        if lstm.bidirectional:
            raise ValueError("a stream has one direction: the other begins at a sequence's end")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._lstm = lstm
        own = self._parameters()[0]
        self.batch_size = batch_size
        self.dtype = own.dtype if dtype is None else dtype
        self.weights = self.dtype if weights is None else weights
        if self.dtype not in KERNEL_DTYPES:
            raise ValueError(f"no stream computes in {self.dtype}")
        if self.weights != self.dtype and self.dtype not in NARROWER.get(self.weights, ()):
            raise ValueError(f"no stream in {self.dtype} keeps its weights in {self.weights}")
        self._native = choose(own, self.dtype, None) == "cpu"
        if not self._native and self.weights != self.dtype:
            raise ValueError(f"a stream on {own.device} keeps its weights in its own dtype")
        sizes = Sizes(lstm.input_size, lstm.hidden_size, lstm.num_layers, lstm.bias, lstm.proj_size)
        self._core: Any
        if self._native:
            I, H, P = lstm.input_size, lstm.hidden_size, lstm.proj_size  # noqa: E741
            dtypes = str(self.dtype), str(self.weights)
            self._core = _C.Stream(*dtypes, batch_size, I, H, P, self._layers())
        else:
            self._core = Steps(sizes, batch_size, self._copies())

    def __call__(self, input: Tensor, out: Tensor | None = None) -> Tensor:
        """The last layer's output for one step or several; the states move on by as many.

        Args:
            input: (B, I) or (T, B, I), time first whatever the module's `batch_first` says.
            out: what to write to, (B, P) or (T, B, P); a new tensor if not given.

        Returns:
            (B, P) or (T, B, P), P being the module's H where it has no projection.

        Raises:
            TypeError, ValueError, RuntimeError: where shape, dtype or device is another.
        """
        return self._core.step(input, out)

    def reset(self, rows: int | Iterable[int] | Tensor | None = None) -> None:
        """States to zero: of all sequences, or of these rows (a number, several, or a (B,) mask).

        Raises:
            IndexError: there is no such row.
        """
        if isinstance(rows, Tensor):
            if rows.dtype is torch.bool:
                if rows.shape != (self.batch_size,):
                    raise IndexError(f"the mask of {self.batch_size} rows is {tuple(rows.shape)}")
                rows = rows.nonzero()
            rows = rows.flatten().tolist()
        elif isinstance(rows, int):
            rows = [rows]
        self._core.reset(None if rows is None else list(rows))

    @property
    def state(self) -> States:
        """(h, c) as they stand, copies of shapes (L, B, P) and (L, B, H), in the stream's dtype.

        Of 16-bit dtypes c is kept in float32, and what `fork` copies is exact. To set them, assign
        two such tensors.
        """
        return self._core.state()

    @state.setter
    def state(self, hx: States) -> None:
        self._core.set_state(*hx)

    def fork(self) -> Stream:
        """Another stream that goes on from the same states, with the same weights, kept once."""
        other = Stream.__new__(Stream)
        other.__dict__.update(self.__dict__)
        other._core = self._core.fork()
        return other

    def refresh(self) -> None:
        """Takes the module's weights anew, the states stay. Forks keep what they have."""
        self._core.pack(self._layers() if self._native else self._copies())

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes of the packed weights, which forks share, and of the states."""
        return self._core.weight_bytes, self._core.state_bytes

    def _parameters(self) -> list[Tensor]:
        lstm = self._lstm
        flat: list[Tensor] = [getattr(lstm, name).detach() for name in lstm._flat_weights_names]
        check_weight_shapes(flat, lstm, lstm.proj_size or lstm.hidden_size, 1)
        return flat

    def _copies(self) -> list[Tensor]:
        return [weight.to(self.dtype, copy=True) for weight in self._parameters()]

    def _layers(self) -> list[list[Tensor | None]]:
        return layers_of(self._parameters(), self._lstm, self.dtype, self.weights)


def layers_of(
    flat: Sequence[Tensor], lstm: FusedLSTM, dtype: torch.dtype, weights: torch.dtype
) -> list[list[Tensor | None]]:
    """w_ih, w_hh, b_ih, b_hh, w_hr of each layer, dense, None where there is none, as the native
    part takes them that keeps matrices in the dtype `weights`."""
    kept = torch.float32 if weights is torch.int8 else weights  # bytes are made of float32
    each = len(flat) // lstm.num_layers
    layers = []
    for first in range(0, len(flat), each):
        layer: list[Tensor | None] = [
            weight.to(kept if weight.dim() == 2 else dtype).contiguous()
            for weight in flat[first : first + each]
        ]
        projection = layer.pop() if lstm.proj_size else None
        layers.append([*layer, *[None] * (4 - len(layer)), projection])
    return layers
