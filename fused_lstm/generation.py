"""`generate`: ids after ids, each drawn from the scores that the ones before it give."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import _C
from .functional import States
from .module import FusedLSTM
from .stream import Stream, layers_of

# Of x W_ih^T + b for each id, above which the rows of an embedding go in instead: it takes 4H
# numbers an id.
TABLE_BYTES = 64 << 20
CHUNK = 256  # steps that go by before Ctrl-C is heeded


@dataclass(frozen=True)
class Choice:
    """How an id is drawn: `generate` says what these are.

    Raises:
        ValueError: one is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop: Sequence[int] = field(default=())

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")

    def native(self) -> tuple[float, int, float, list[int]]:
        """temperature, top_k, top_p, stop as the native part takes them."""
        top_k = 2**62 if self.top_k is None else self.top_k
        return self.temperature, top_k, 2.0 if self.top_p is None else self.top_p, list(self.stop)


def choose(scores: Tensor, choice: Choice, generator: torch.Generator | None) -> Tensor:
    """The ids (B,) that are drawn from scores (B, V): what the native part does for each row.

    The ids in question are laid out along [0, 1), each as wide as it is likely: in their order, or
    with top_p or a top_k that leaves some out, the likeliest first. A uniform number a row says
    where, `torch.rand(B, dtype=torch.float64)` for all; with temperature 0 there is none.

    Raises:
        RuntimeError: a score isn't finite.
    """
    scores = scores.double()
    if not scores.isfinite().all():
        raise RuntimeError("the scores aren't finite: the model has diverged")
    if choice.temperature == 0:
        return scores.argmax(1)
    u = torch.rand(len(scores), dtype=torch.float64, device=scores.device, generator=generator)
    largest = scores.amax(1, keepdim=True)
    order = None
    if choice.top_p is not None or (choice.top_k or scores.shape[1]) < scores.shape[1]:
        scores, order = scores.sort(descending=True, stable=True)
        scores = scores[:, : choice.top_k]
    weights = ((scores - largest) / choice.temperature).exp()
    if choice.top_p is not None:
        sums = weights.cumsum(1)
        before = functional.pad(sums[:, :-1], (1, 0))
        weights = weights * (before < choice.top_p * sums[:, -1:])
    sums = weights.cumsum(1)
    at = torch.searchsorted(sums, u[:, None] * sums[:, -1:], right=True)
    # u may be so near 1 that rounding leaves nothing beyond it.
    at = at.minimum((weights > 0).cumsum(1).argmax(1, keepdim=True))
    return (at if order is None else order.gather(1, at))[:, 0]


class Sampler:
    """An LSTM with its head, packed once, and the states it is in: text goes in and comes out.

    Args:
        lstm, head, embedding: as `generate` takes them. What is kept is a copy.
        batch_size: B, the texts side by side.
        weights: as of `FusedLSTM.stream`, the head's too.

    Raises:
        ValueError: sizes that don't fit each other, or as `FusedLSTM.stream` does.
    """

    def __init__(
        self,
        lstm: FusedLSTM,
        head: nn.Linear,
        batch_size: int = 1,
        *,
        embedding: nn.Embedding | Tensor | None = None,
        weights: torch.dtype | None = None,
    ) -> None:
        rows = embedding.weight if isinstance(embedding, nn.Embedding) else embedding
        P = lstm.proj_size or lstm.hidden_size
        self.vocabulary = head.out_features
        entries = (lstm.input_size,) * 2 if rows is None else tuple(rows.shape)
        if entries != (self.vocabulary, lstm.input_size):
            what = "one-hot input" if rows is None else "the embedding"
            raise ValueError(
                f"{what} is {entries}, expected ({self.vocabulary}, {lstm.input_size}): the head's "
                "out_features and the LSTM's input_size"
            )
        if head.in_features != P:
            raise ValueError(f"the head has in_features {head.in_features}, the LSTM gives {P}")
        stream = Stream(lstm, batch_size, weights=weights)
        self.batch_size = batch_size
        self._core: Any
        if stream._native:
            self._core = _native(stream, head, rows)
        else:
            self._core = Loop(stream, head, rows)
        self._device = head.weight.device

    def draw(
        self,
        ids: Tensor,
        length: int,
        choice: Choice = Choice(),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Takes ids (B, T) in, T at least 1, and draws `length` more.

        Returns:
            (B, n), n less than `length` where no row goes on. The last id, of those drawn or given,
            has not gone in: the next call may begin with it.
        """
        if length < 0:
            raise ValueError(f"length must be at least 0, got {length}")
        if ids.dim() != 2 or ids.shape[0] != self.batch_size or ids.shape[1] < 1:
            raise ValueError(f"ids must be (B, T), B {self.batch_size}, got {tuple(ids.shape)}")
        given, drawn = ids.t(), []
        while len(given) > CHUNK:
            self._core.draw(given[: CHUNK + 1], 0, *choice.native(), generator)
            given = given[CHUNK:]
        while True:
            steps = min(length, CHUNK)
            found = self._core.draw(given, steps, *choice.native(), generator)
            drawn.append(found)
            length -= steps
            if length == 0 or len(found) < steps:
                return torch.cat(drawn).t()
            given = found[-1:].clamp(min=0)

    @property
    def state(self) -> States:
        """(h, c) as nn.LSTM shapes them: before the last id, and where a row has stopped before the
        id that stopped it. Once set, all rows go on."""
        return self._core.state()

    @state.setter
    def state(self, hx: States) -> None:
        self._core.set_state(*hx)


def _native(stream: Stream, head: nn.Linear, embedding: Tensor | None) -> Any:
    lstm, wide = stream._lstm, torch.float64 if stream.dtype is torch.float64 else torch.float32
    flat = stream._parameters()
    layers = layers_of(flat, lstm, stream.dtype, stream.weights)
    input_size = lstm.input_size
    table = None
    if embedding is None or 4 * lstm.hidden_size * len(embedding) * wide.itemsize <= TABLE_BYTES:
        w_ih = flat[0].to(stream.dtype).to(wide)
        table = w_ih.t() if embedding is None else embedding.detach().to(wide) @ w_ih.t()
        if lstm.bias:
            table = table + (flat[2].to(stream.dtype).to(wide) + flat[3].to(stream.dtype).to(wide))
        table, embedding, input_size = table.contiguous(), None, 0
        layers[0][0] = None
    kept = torch.float32 if stream.weights is torch.int8 else stream.weights
    bias = None if head.bias is None else head.bias.detach().to(stream.dtype).contiguous()
    text = [head.weight.detach().to(kept).contiguous(), bias, table, embedding]
    if embedding is not None:
        text[3] = embedding.detach().to(stream.dtype).contiguous()
    sizes = stream.batch_size, input_size, lstm.hidden_size, lstm.proj_size
    dtypes = str(stream.dtype), str(stream.weights)
    return _C.Sampler(*dtypes, *sizes, layers, head.out_features, text)


class Loop:
    """`_C.Sampler` in Python, over a stream on any device: what the native one is tested against.

    The head computes in float32, float64 for float64, whatever the dtype.
    """

    def __init__(self, stream: Stream, head: nn.Linear, embedding: Tensor | None) -> None:
        self._stream = stream
        self._wide = torch.float64 if stream.dtype is torch.float64 else torch.float32
        self._weight = head.weight.detach().to(stream.dtype).to(self._wide)
        bias = head.bias
        self._bias = None if bias is None else bias.detach().to(stream.dtype).to(self._wide)
        V = head.out_features
        if embedding is None:
            embedding = torch.eye(V, dtype=stream.dtype, device=head.weight.device)
        self._embedding = embedding.detach().to(stream.dtype)
        self._stopped = torch.zeros(stream.batch_size, dtype=torch.bool, device=embedding.device)
        self._at_stop = stream.state

    @torch.no_grad()
    def draw(
        self,
        ids: Tensor,
        length: int,
        temperature: float,
        top_k: int,
        top_p: float,
        stop: Sequence[int],
        generator: torch.Generator | None,
    ) -> Tensor:
        V = len(self._embedding)
        if (outside := (ids < 0) | (ids >= V)).any():
            raise IndexError(f"id {ids[outside][0]} is not among the {V} of the vocabulary")
        choice = Choice(temperature, top_k, None if top_p > 1 else top_p)
        stops = torch.tensor(list(stop), dtype=torch.int64, device=ids.device)
        if self._stopped.all():
            return ids[:0]
        rows = list(ids[:-1] if length == 0 else ids)
        drawn: list[Tensor] = []
        while rows or (len(drawn) < length and not self._stopped.all()):
            y = self._stream(self._embedding[rows.pop(0) if rows else drawn[-1].clamp(min=0)])
            if rows or length == 0:
                continue
            scores = functional.linear(y.to(self._wide), self._weight, self._bias)
            found = choose(scores, choice, generator).masked_fill(self._stopped, -1)
            stopping = torch.isin(found, stops)
            for kept, now in zip(self._at_stop, self._stream.state, strict=True):
                kept[:, stopping] = now[:, stopping]
            self._stopped |= stopping
            drawn.append(found)
        return torch.stack(drawn) if drawn else ids[:0]

    def state(self) -> States:
        h, c = self._stream.state
        for now, kept in zip((h, c), self._at_stop, strict=True):
            now[:, self._stopped] = kept[:, self._stopped]
        return h, c

    def set_state(self, h_0: Tensor, c_0: Tensor) -> None:
        self._stream.state = h_0, c_0
        self._stopped.zero_()


def generate(
    lstm: FusedLSTM,
    head: nn.Linear,
    ids: Tensor,
    hx: States | None = None,
    *,
    length: int,
    embedding: nn.Embedding | Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: int | Iterable[int] | None = None,
    weights: torch.dtype | None = None,
) -> tuple[Tensor, States]:
    """Draws ids that go on from given ones; on the CPU the whole loop is one native call.

    Every id goes into `lstm`, as a row of `embedding` or a one-hot vector, and `head` makes scores
    of what comes out, from which the next is drawn. There are no gradients and no dropout. Rows of
    the batch are independent. The same generator and arguments draw the same ids.

    Args:
        lstm: in one direction.
        head: (P, V): `nn.Linear(P, V)`, P being the LSTM's H where it has no projection.
        ids: (B, T) int64, T at least 1: all of them go in first.
        hx: the states before them, (L, B, P) and (L, B, H); zeros if not given.
        length: how many to draw.
        embedding: `nn.Embedding(V, I)`, or its rows (V, I); None: one-hot, V = I.
        temperature: scores are divided by it; 0 takes the likeliest.
        top_k: draw among so many likeliest.
        top_p: of those, among the fewest that together have this probability.
        generator: on the device; torch's own if not given. Each step takes B numbers of it, as
            `torch.rand(B, dtype=torch.float64)` does (with temperature 0 none).
        stop: ids that end a row: -1 follows.
        weights: a narrower dtype to keep weights in, as `FusedLSTM.stream` has it.

    Returns:
        ids (B, length), and the states before the last of them has gone in (where a row has
        stopped, before the one that stopped it): to go on, give those states and the last ids.

    Raises:
        ValueError: sizes that don't fit each other, or an option out of its range.
        IndexError: an id outside the vocabulary.
        RuntimeError: the scores aren't finite, or as of `FusedLSTM.stream`.
    """
    stops = () if stop is None else (stop,) if isinstance(stop, int) else tuple(stop)
    choice = Choice(temperature, top_k, top_p, stops)
    if ids.dim() != 2:
        raise ValueError(f"ids must be (B, T), got {tuple(ids.shape)}")
    sampler = Sampler(lstm, head, len(ids), embedding=embedding, weights=weights)
    if hx is not None:
        sampler.state = hx
    drawn = sampler.draw(ids, length, choice, generator)
    return functional.pad(drawn, (0, length - drawn.shape[1]), value=-1), sampler.state
