"""`generate`: the ids that the same loop in Python draws; options, states, stops, rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_stream import quantised
from torch import Tensor, nn
from torch.nn import functional

from fused_lstm import _C, FusedLSTM, backend, generate, generation
from fused_lstm.generation import Choice, Loop, Sampler

V = 61
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.3},
    {"temperature": 1.7, "top_k": 5},
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.5},
    {"top_p": 1.0},
    {"top_p": 1e-9},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1e-300, "top_k": 7},
]


class Model:
    """An LSTM with its head; scores are spread out, for draws to differ."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, E: int = 0, H: int = 33, **lstm: Any):
        self.lstm = FusedLSTM(E or V, H, dtype=dtype, **lstm)
        self.head = nn.Linear(lstm.get("proj_size") or H, V, dtype=dtype)
        self.embedding = nn.Embedding(V, E, dtype=dtype) if E else None
        with torch.no_grad():
            self.head.weight.mul_(8)

    def generate(self, ids: Tensor, *hx: Any, **options: Any) -> Any:
        return generate(self.lstm, self.head, ids, *hx, embedding=self.embedding, **options)

    def input(self, ids: Tensor) -> Tensor:
        if self.embedding is not None:
            return self.embedding(ids)
        return functional.one_hot(ids, V).to(self.head.weight.dtype)


@torch.no_grad()
def written_out(
    model: Model,
    ids: Tensor,
    hx: Any = None,
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator,
    stop: int | None = None,
) -> Tensor:
    """The loop, a row and an id at a time."""
    wide = torch.float64 if model.head.weight.dtype is torch.float64 else torch.float32
    weight, bias = model.head.weight.to(wide), model.head.bias.to(wide)
    drawn: list[list[int]] = [[] for _ in ids]
    steps = model.input(ids).transpose(0, 1)
    for _ in range(length):
        for x in steps:
            y, hx = model.lstm(x[None], hx)
        scores = functional.linear(y[0].to(wide), weight, bias).double()
        uniform = torch.rand(len(ids), dtype=torch.float64, generator=generator)
        for row, u in zip(range(len(ids)), uniform.tolist(), strict=True):
            if stop is not None and stop in drawn[row]:
                drawn[row].append(-1)
            else:
                drawn[row].append(written_out_choice(scores[row], u, temperature, top_k, top_p))
        last = torch.tensor([row[-1:] for row in drawn]).clamp(min=0)
        steps = model.input(last).transpose(0, 1)
    return torch.tensor(drawn)


def written_out_choice(
    scores: Tensor, u: float, temperature: float, top_k: int | None, top_p: float | None
) -> int:
    ids = list(range(len(scores)))
    if temperature == 0:
        return int(scores.argmax())
    if (top_k or V) < V or top_p is not None:
        ids.sort(key=lambda i: (-float(scores[i]), i))
        ids = ids[:top_k]
    p = ((scores[ids] - scores.max()) / temperature).softmax(0).tolist()
    if top_p is not None and top_p < 1:
        kept = next((n for n in range(1, len(p)) if sum(p[:n]) >= top_p), len(p))
        p = [one / sum(p[:kept]) for one in p[:kept]]
    at = 0
    while at + 1 < len(p) and sum(p[: at + 1]) <= u:
        at += 1
    return ids[at]


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompt(B: int, T: int = 4) -> Tensor:
    return torch.randint(V, (B, T))


MODELS: dict[str, Callable[[], Model]] = {
    "one-hot": lambda: Model(),
    "embedding": lambda: Model(E=5),
    "two layers, projected": lambda: Model(E=17, num_layers=2, proj_size=7),
    "no bias": lambda: Model(bias=False),
    "float64": lambda: Model(torch.float64, E=3, num_layers=2),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_ids_of_the_loop_written_out(kind: str, options: dict[str, Any]) -> None:
    model, ids = MODELS[kind](), prompt(33)
    found, _ = model.generate(ids, length=40, generator=seeded(), **options)
    expected = written_out(model, ids, length=40, generator=seeded(), **options)
    assert torch.equal(found, expected)
    if not options:
        assert len(found.unique()) > V / 2


@pytest.fixture(params=[name for name, usable in _C.cpu_isas() if usable])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.cpu_isa()
    _C.force_cpu_isa(request.param)
    yield request.param
    _C.force_cpu_isa(before)


def loop(model: Model, B: int, weights: torch.dtype | None = None) -> Loop:
    """The loop in Python that serves other devices."""
    embedding = None if model.embedding is None else model.embedding.weight
    return Loop(model.lstm.stream(B, weights=weights), model.head, embedding)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("E", [0, 6])
def test_the_ids_of_the_loop_in_python(E: int, options: dict[str, Any], isa: str) -> None:
    model, ids = Model(E=E, num_layers=2), prompt(9, 1)
    found, state = model.generate(ids, length=100, generator=seeded(), **options)
    python = loop(model, 9)
    expected = python.draw(ids.t(), 100, *Choice(**options).native(), seeded())
    assert torch.equal(found, expected.t())
    torch.testing.assert_close(state, python.state())


@pytest.mark.parametrize(
    ("dtype", "weights", "off"),
    [
        (torch.bfloat16, None, 0.03),
        (torch.float16, None, 0.004),
        (torch.float32, torch.bfloat16, 1e-4),
        (torch.float32, torch.int8, 1e-3),
        (torch.bfloat16, torch.int8, 0.03),
        (torch.float16, torch.int8, 0.004),
    ],
    ids=str,
)
@pytest.mark.parametrize("E", [0, 6])
@torch.no_grad()
def test_narrow_numbers(
    E: int, dtype: torch.dtype, weights: torch.dtype | None, off: float, isa: str
) -> None:
    """Each id is where the uniform number points to among the likelihoods that float64 computes
    from the same weights, but for rounding: off by so much of them."""
    model, ids = Model(dtype, E=E, num_layers=2), prompt(33, 3)
    found, _ = model.generate(ids, length=40, generator=seeded(), weights=weights)
    exact = Model(torch.float64, E=E, num_layers=2)
    for into, module in ((exact.lstm, model.lstm), (exact.head, model.head)):
        into.load_state_dict(module.state_dict())
    if model.embedding is not None:
        exact.embedding.load_state_dict(model.embedding.state_dict())
    kept = [w for name, w in exact.lstm.named_parameters() if name != "weight_ih_l0"]
    for weight in (*kept, exact.head.weight):
        if weights is not None and weight.dim() == 2:
            of = weight.float()
            weight.copy_(quantised(of) if weights is torch.int8 else of.to(weights))
    gone_in = torch.cat((ids, found[:, :-1]), 1)
    y, _ = exact.lstm(exact.input(gone_in).transpose(0, 1))
    likely = exact.head(y[ids.shape[1] - 1 :]).softmax(-1)  # (length, B, V)
    generator = seeded()
    u = torch.stack([torch.rand(33, dtype=torch.float64, generator=generator) for _ in likely])
    ends = likely.cumsum(-1).gather(-1, found.t()[..., None])[..., 0]
    begins = ends - likely.gather(-1, found.t()[..., None])[..., 0]
    assert (u < ends + off).all() and (u > begins - off).all()
    assert ((u < ends) & (u > begins)).double().mean() > 0.9


def test_an_embedding_too_large_for_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = Model(E=5, num_layers=2), prompt(3)
    expected, state = model.generate(ids, length=300, generator=seeded())
    monkeypatch.setattr(generation, "TABLE_BYTES", 0)
    found, other = model.generate(ids, length=300, generator=seeded())
    assert torch.equal(found, expected)
    torch.testing.assert_close(other, state)


def test_another_backend() -> None:
    model, ids = Model(E=5), prompt(3)
    expected, state = model.generate(ids, length=20, generator=seeded(), top_k=9)
    with backend("reference"):
        found, other = model.generate(ids, length=20, generator=seeded(), top_k=9)
    assert torch.equal(found, expected)
    torch.testing.assert_close(other, state)


def test_rows_are_independent() -> None:
    model, ids = Model(), prompt(5)
    found, state = model.generate(ids, length=50, generator=seeded())
    others = prompt(5)
    others[2] = ids[2]
    again, other = model.generate(others, length=50, generator=seeded())
    assert torch.equal(found[2], again[2])
    assert torch.equal(state[0][:, 2], other[0][:, 2])
    assert not torch.equal(found, again)


def test_goes_on_from_states() -> None:
    model, ids = Model(E=3, num_layers=2), prompt(3)
    expected, state = model.generate(ids, length=70, generator=seeded())
    generator = seeded()
    first, hx = model.generate(ids, length=30, generator=generator)
    second, last = model.generate(first[:, -1:], hx, length=40, generator=generator)
    assert torch.equal(torch.cat((first, second), 1), expected)
    assert torch.equal(torch.stack(last), torch.stack(state))
    none, before = model.generate(ids, length=0, generator=generator)
    assert none.shape == (3, 0)
    with torch.no_grad():
        _, hx = model.lstm(model.input(ids[:, :-1]).transpose(0, 1))
    torch.testing.assert_close(before, hx)


def test_torchs_own_generator() -> None:
    model, ids = Model(), prompt(3)
    torch.manual_seed(5)
    first, _ = model.generate(ids, length=20)
    torch.manual_seed(5)
    second, _ = model.generate(ids, length=20)
    third, _ = model.generate(ids, length=20)
    assert torch.equal(first, second) and not torch.equal(first, third)
    generator = seeded()
    before = generator.get_state()
    model.generate(ids, length=20, temperature=0, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_stop() -> None:
    model, ids = Model(), prompt(33)
    free, _ = model.generate(ids, length=40, generator=seeded())
    stop = int(free.flatten().bincount().argmax())
    found, (h, c) = model.generate(ids, length=40, generator=seeded(), stop=stop)
    assert torch.equal(found, written_out(model, ids, length=40, generator=seeded(), stop=stop))
    ends = [(row == stop).nonzero().flatten().tolist() for row in free]
    assert any(ends) and not all(ends)
    for row, (own, end) in enumerate(zip(found, ends, strict=True)):
        n = end[0] if end else 39
        assert torch.equal(own[: n + 1], free[row, : n + 1])
        assert (own[n + 1 :] == -1).all()
        gone_in = torch.cat((ids[row], own[:n]))[None]
        with torch.no_grad():
            _, (h_n, c_n) = model.lstm(model.input(gone_in).transpose(0, 1))
        torch.testing.assert_close((h[:, row], c[:, row]), (h_n[:, 0], c_n[:, 0]))
    python = loop(model, 33)
    expected = python.draw(ids.t(), 40, 1.0, V, 2.0, [stop], seeded())
    assert torch.equal(found, expected.t())
    torch.testing.assert_close((h, c), python.state())


def test_all_rows_stopped_ends_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "CHUNK", 3)
    model, ids = Model(), prompt(4)
    generator, other = seeded(), seeded()
    found, state = model.generate(ids, length=50, generator=generator, stop=range(V))
    assert (found[:, 0] >= 0).all() and (found[:, 1:] == -1).all()
    torch.rand(4, dtype=torch.float64, generator=other)
    assert torch.equal(generator.get_state(), other.get_state())
    sampler = Sampler(model.lstm, model.head, 4)
    assert sampler.draw(ids, 50, Choice(stop=range(V)), seeded()).shape == (4, 1)
    assert sampler.draw(ids, 50).shape == (4, 0)
    sampler.state = state
    assert sampler.draw(found[:, :1], 50).shape == (4, 50)


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = Model(), prompt(3)
    expected, state = model.generate(ids, length=40, generator=seeded(), stop=[3, 5])
    monkeypatch.setattr(generation, "CHUNK", chunk)
    found, other = model.generate(ids, length=40, generator=seeded(), stop=[3, 5])
    assert torch.equal(found, expected)
    assert torch.equal(torch.stack(state), torch.stack(other))


def test_threads_change_nothing() -> None:
    model, ids = Model(E=9, H=513, num_layers=2), prompt(3)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(model.generate(ids, length=30, generator=seeded())[0])
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_nothing_is_changed_or_recorded() -> None:
    model, ids = Model(E=3, num_layers=2), prompt(2)
    model.lstm.dropout = 0.5
    model.lstm.train()
    kept = ids.clone()
    first, hx = model.generate(ids, length=20, generator=seeded())
    second, _ = model.generate(ids, length=20, generator=seeded())
    assert torch.equal(first, second) and torch.equal(ids, kept)
    assert model.lstm.training and not hx[0].requires_grad


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"length": -1}, ValueError, "length must be at least 0, got -1"),
        ({"temperature": -1}, ValueError, "temperature must be at least 0, got -1"),
        ({"temperature": float("nan")}, ValueError, "temperature must be"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_p": 0}, ValueError, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, ValueError, "top_p must be"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"ids must be \(B, T\), got"),
        ({"ids": torch.zeros(3, 0, dtype=torch.int64)}, ValueError, r"ids must be \(B, T\), B 3"),
        ({"ids": torch.zeros(3, 1)}, ValueError, "ids must be of dtype torch.int64"),
        ({"ids": torch.full((1, 2), V)}, IndexError, f"id {V} is not among the {V}"),
        ({"ids": torch.full((1, 2), -1)}, IndexError, "id -1 is not among"),
        ({"embedding": torch.zeros(V, 3)}, ValueError, "the embedding is"),
        ({"head": nn.Linear(33, 5)}, ValueError, "one-hot input is"),
        ({"head": nn.Linear(5, V)}, ValueError, "the head has in_features 5"),
        ({"hx": (torch.zeros(1, 1, 3),) * 2}, RuntimeError, r"Expected hidden\[0\] size"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator"),
        ({"weights": torch.float16}, ValueError, "keeps its weights in"),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = Model()
    given = {"head": model.head, "ids": prompt(1), "hx": None, "length": 2} | options
    with pytest.raises(error, match=words):
        generate(model.lstm, **given)


def test_scores_that_are_not_finite() -> None:
    model = Model()
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    with pytest.raises(RuntimeError, match="scores aren't finite"):
        model.generate(prompt(1), length=2)
    with pytest.raises(RuntimeError, match="scores aren't finite"):
        loop(model, 1).draw(prompt(1).t(), 2, 1.0, V, 2.0, [], None)
