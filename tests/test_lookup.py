"""Ids and an embedding in place of its rows: the results are as with the rows, and the kernel looks
them up by itself wherever it can. Where it can't: test_lookup_by_torch.py."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from parity import DTYPES, Options, assert_close, assert_same_bits
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.flop_counter import FlopCounterMode

from fused_lstm import FusedLSTM, lookup

V = 11


class Model(nn.Module):
    """An embedding and an LSTM, which together take ids."""

    def __init__(self, lstm: nn.Module, embedding: nn.Embedding, together: bool = False) -> None:
        super().__init__()
        self.lstm, self.embedding, self.together = lstm, embedding, together

    def forward(self, ids: Any, hx: Any = None) -> Any:
        if self.together:
            return self.lstm(ids, hx, embedding=self.embedding)
        if isinstance(ids, PackedSequence):
            return self.lstm(PackedSequence(self.embedding(ids.data), *ids[1:]), hx)
        return self.lstm(self.embedding(ids), hx)


def ids_for(options: Options, rows: int = V) -> Any:
    T, B = options.T, options.B
    if options.kind in ("packed", "unsorted"):
        sequences = [torch.randint(rows, (length,)) for length in options.lengths()]
        return pack_sequence(sequences, enforce_sorted=options.kind == "packed")
    shape = (T,) if options.kind == "2-D" else (B, T) if options.batch_first else (T, B)
    return torch.randint(rows, shape)


def models(options: Options, dtype: torch.dtype, rows: int = V) -> tuple[Model, Model, Model]:
    """nn.LSTM in float64, in `dtype`, and FusedLSTM, of the same numbers."""
    stock = Model(options.lstm(dtype=dtype), nn.Embedding(rows, options.I, dtype=dtype))
    fused = Model(FusedLSTM.from_torch(stock.lstm), copy.deepcopy(stock.embedding), together=True)
    return copy.deepcopy(stock).double(), stock, fused


@pytest.fixture(autouse=True)
def _few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lookup.LEAST_USES, 2, 2)


def results(model: Model, ids: Any, hx: Any, cotangents: list[Tensor]) -> dict[str, Tensor]:
    dtype = model.embedding.weight.dtype
    hx = None if hx is None else tuple(state.to(dtype, copy=True).requires_grad_() for state in hx)
    model.zero_grad()
    output, (h_n, c_n) = model(ids, hx)
    output = output.data if isinstance(ids, PackedSequence) else output
    found = [output, h_n, c_n]
    torch.autograd.backward(found, [c.to(f.dtype) for c, f in zip(cotangents, found, strict=True)])
    named = dict(zip(("output", "h_n", "c_n"), found, strict=True))
    for name, state in zip(("grad h_0", "grad c_0"), hx or (), strict=False):
        named[name] = state.grad
    for name, parameter in model.named_parameters():
        named[f"grad {name}"] = parameter.grad
    return {name: value.detach().clone() for name, value in named.items()}


def arguments(model: Model, ids: Any, options: Options) -> tuple[Any, list[Tensor]]:
    """hx and cotangents, in float32 or the model's dtype if it is narrower."""
    dtype = torch.promote_types(model.embedding.weight.dtype, torch.float32)
    model = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        output, states = model(ids)
    output = output.data if isinstance(ids, PackedSequence) else output
    cotangents = [torch.randn_like(each) for each in (output, *states)]
    hx = tuple(torch.randn_like(state) for state in states) if options.given_hx else None
    return hx, cotangents


def check(
    options: Options, dtype: torch.dtype, rows: int = V, autocast: torch.dtype | None = None
) -> None:
    exact, stock, fused = models(options, dtype, rows)
    ids = ids_for(options, rows)
    given = arguments(stock, ids, options)
    rounded = [[t.to(autocast or dtype) for t in each] if each else each for each in given]
    truth = results(exact, ids, *rounded)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        found = results(fused, ids, *rounded)
        # Under autocast oneDNN has code for some processors only, and results of other dtypes.
        with torch.backends.mkldnn.flags(enabled=autocast is None):
            yardstick = results(stock, ids, *rounded)
    if autocast:
        with torch.autocast("cpu", autocast):
            of_rows = results(Model(fused.lstm, fused.embedding), ids, *rounded)
        assert [t.dtype for t in found.values()] == [t.dtype for t in of_rows.values()]
        yardstick = {name: value.to(found[name].dtype) for name, value in yardstick.items()}
    assert_close(found, yardstick, truth, precision=autocast)


OPTIONS = [
    Options(layers, bias, first, both, proj, hx, kind, T=9)
    for layers, bias, (first, kind), both, proj, hx in itertools.product(
        (1, 3),
        (True, False),
        [(False, "3-D"), (True, "3-D"), (False, "2-D"), (False, "packed"), (True, "unsorted")],
        (False, True),
        (0, 5),
        (True, False),
    )
]


@pytest.mark.parametrize(("dtype", "threads"), [
    (torch.float32, 1), (torch.float32, 2), (torch.float64, 2), (torch.bfloat16, 1),
    (torch.float16, 2),
], ids=str)  # fmt: skip
def test_options(dtype: torch.dtype, threads: int, looked_up: list[bool]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for options in OPTIONS:
            check(options, dtype, rows=4)
    finally:
        torch.set_num_threads(before)
    assert all(looked_up) and len(looked_up) == len(OPTIONS)


# As sizes decide: nothing packed; dW row by row; several chunks of rows; columns split by threads,
# or rows; few rows a step; parts of vectors; many rows of the embedding.
SIZES = {
    "dense": (Options(T=3, B=4, I=5, H=131), 6),
    "one step": (Options(T=1, B=9, I=5, H=131), 4),
    "few rows": (Options(T=2, B=3, I=5, H=33), 3),
    "chunks": (Options(T=67, B=12, I=7, H=97), 65),
    "by units": (Options(T=13, B=33, I=31, H=353), 65),
    "two directions": (Options(T=37, B=20, I=9, H=65, bidirectional=True, proj_size=31), 33),
    "few sequences": (Options(T=301, B=2, I=9, H=129), 65),
    "many sequences": (Options(T=9, B=131, I=3, H=29, kind="packed"), 65),
    "many rows": (Options(T=97, B=23, I=5, H=19), 1003),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(size: str, dtype: torch.dtype, looked_up: list[bool]) -> None:
    check(*SIZES[size][:1], dtype, SIZES[size][1])
    assert all(looked_up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [
    Options(T=9, num_layers=3), Options(T=13, bidirectional=True, proj_size=5),
    Options(T=19, kind="packed", given_hx=False), Options(T=23, bias=False),
], ids=str)  # fmt: skip
def test_autocast(options: Options, dtype: torch.dtype, looked_up: list[bool]) -> None:
    check(options, torch.float32, 4, autocast=dtype)
    assert looked_up == [True]


def test_autocast_inference(looked_up: list[bool]) -> None:
    lstm, embedding = FusedLSTM(17, 33, num_layers=2), nn.Embedding(V, 17)
    ids = ids_for(Options(T=9))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = lstm(ids, embedding=embedding), lstm(embedding(ids))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    assert looked_up == [True]


def test_layers_at_once(looked_up: list[bool]) -> None:
    """A stack whose layers threads compute at once: csrc/cpu/wavefront.h."""
    lstm, embedding = FusedLSTM(17, 129, num_layers=3), nn.Embedding(65, 17)
    ids = torch.randint(65, (300, 1))
    with torch.no_grad():
        found, states = lstm(ids, embedding=embedding)
        expected, expected_states = lstm(embedding(ids))
    torch.testing.assert_close((found, states), (expected, expected_states))
    assert looked_up == [True]


def test_one_hot() -> None:
    """The identity as embedding; each sum has one summand that isn't zero, so it has no error."""
    lstm = FusedLSTM(V, 17, batch_first=True)
    ids = torch.randint(V, (3, 19))
    found = lstm(ids, embedding=torch.eye(V))
    expected = lstm(nn.functional.one_hot(ids, V).float())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_same_bits_for_any_number_of_threads() -> None:
    """Of the operators: what W_ih E^T is, torch decides."""
    torch.manual_seed(0)
    ids = torch.randint(65, (37, 20))
    h_0, c_0 = torch.randn(1, 20, 353), torch.randn(1, 20, 353)
    weights = [parameter.detach() for parameter in FusedLSTM(65, 353).parameters()]
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = dict(enumerate(forward_and_backward(ids, h_0, c_0, weights)))
        found.append({str(key): value for key, value in results.items()})
    torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_bits(found[0], other, "threads")


def forward_and_backward(
    ids: Tensor, h_0: Tensor, c_0: Tensor, weights: list[Tensor]
) -> list[Tensor]:
    ops = torch.ops.fused_lstm
    output, h_n, c_n, gates, cells = ops.lstm_forward(ids, None, h_0, c_0, weights)
    needs = [False, True, True] + [True] * len(weights)
    grads = ops.lstm_backward(
        output, h_n, c_n, ids, None, h_0, c_0, weights, output, gates, cells, needs
    )
    return [output, h_n, c_n, gates, cells, *grads[1:3], *grads[3]]


# --- transforms, orders and compilers -------------------------------------------------------------


@pytest.fixture
def pair() -> tuple[Model, Model]:
    """The same model in float64, with rows and with ids."""
    _, stock, fused = models(Options(num_layers=2, H=3), torch.float64, 4)
    return stock, fused


def loss(model: Model, ids: Tensor) -> Tensor:
    output, (h_n, c_n) = model(ids)
    return output.pow(2).sum() + h_n.sum() * c_n.sin().sum()


def test_double_backward(pair: tuple[Model, Model], looked_up: list[bool]) -> None:
    ids, found = torch.randint(4, (5, 3)), []
    for model in pair:
        parameters = list(model.parameters())
        first = torch.autograd.grad(loss(model, ids), parameters, create_graph=True)
        norm = torch.stack([grad.pow(2).sum() for grad in first]).sum()
        found.append((first, torch.autograd.grad(norm, parameters)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
    assert looked_up == [True]


def test_torch_func(pair: tuple[Model, Model]) -> None:
    ids, found = torch.randint(4, (5, 3)), []
    for model in pair:
        parameters = dict(model.named_parameters())

        def of(parameters: dict[str, Tensor], model: Model = model) -> Tensor:
            return torch.func.functional_call(model, parameters, (ids,))[0].pow(2).sum()

        found.append(torch.func.grad(of)(parameters))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_batched_backward(pair: tuple[Model, Model]) -> None:
    """Several cotangents at once, of what was recorded with ids."""
    ids, found = torch.randint(4, (5, 3)), []
    cotangents = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    for model in pair:
        output, _ = model(ids)
        parameters = list(model.parameters())
        found.append(torch.autograd.grad(output, parameters, cotangents, is_grads_batched=True))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_compile(pair: tuple[Model, Model], looked_up: list[bool]) -> None:
    _, model = pair
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = torch.randint(4, (5, 3))
    found = []
    for run in (model, compiled):
        model.zero_grad()
        output, states = run(ids)
        output.pow(2).sum().backward()
        found.append((output, states, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*found)
    assert looked_up == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed: bool, dtype: torch.dtype) -> None:
    lstm = FusedLSTM(V, 5, bidirectional=True, dtype=dtype)
    lstm.weight_ih_l0.data, lstm.weight_ih_l0_reverse.data = torch.randn(2, 20, V)  # of sums
    h_0, c_0 = torch.randn(2, 2, 3, 5, dtype=dtype, requires_grad=True)
    sizes = torch.tensor([3, 2, 2]) if packed else None
    ids = torch.randint(V, (7,) if packed else (7, 3))
    operands = (ids, sizes, h_0, c_0, list(lstm.parameters()))
    ops = torch.ops.fused_lstm
    torch.library.opcheck(ops.lstm_forward.default, operands)
    plain = (ids, sizes, h_0.detach(), c_0.detach(), [p.detach() for p in lstm.parameters()])
    torch.library.opcheck(ops.lstm_inference.default, plain)
    torch.library.opcheck(ops.lstm_stack_inference.default, (*plain, 1))


def test_flops() -> None:
    """W_ih E^T, its two gradients, and h W_hh^T and its two: none of the input."""
    lstm, embedding = FusedLSTM(3, 17), nn.Embedding(V, 3)
    with FlopCounterMode(display=False) as counter:
        # Of a module, FlopCounterMode has a hook.
        lstm(torch.randint(V, (7, 5)), embedding=embedding.weight)[0].sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 4 * 17 * (V * 3 + 7 * 5 * 17)
