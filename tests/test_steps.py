"""Streams where the native steps don't serve: the module's own operators, a graph on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_stream import named, streamed
from torch import Tensor

from fused_lstm import FusedLSTM, backend, generate
from fused_lstm.steps import Steps
from fused_lstm.stream import Stream

STEPS = 5


def cpu_stream(*sizes: int, **options: int) -> Stream:
    with backend("reference"):
        return FusedLSTM(*sizes, **options).stream(3)


@pytest.fixture(params=[True, False], ids=["captured", "plain"])
def captured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps on the CPU as if they were replayed: with what a capture does to states before it."""
    if not request.param:
        return

    def replayed(self: Steps) -> Callable[[], None]:
        before = self.state()
        for _ in range(4):
            self._one()
        self.set_state(*before)
        return self._one

    monkeypatch.setattr(Steps, "_plain", replayed)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "proj_size": 5}, {"bias": False}])
def test_as_the_native_one(options: dict[str, int], captured: None) -> None:
    torch.manual_seed(3)
    stream = cpu_stream(7, 9, **options)
    torch.manual_seed(3)
    native = FusedLSTM(7, 9, **options).stream(3)
    assert isinstance(stream._core, Steps) and not isinstance(native._core, Steps)
    x = torch.randn(STEPS, 3, 7)
    expected = streamed(native, x)
    with backend("reference"):
        found = streamed(stream, x)
        chunk = cpu_stream(7, 9, **options)
        chunk._core._weights = stream._core._weights
        of_chunk = named(chunk(x), chunk.state)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
        torch.testing.assert_close(of_chunk[name], tensor)


def test_outputs_are_the_callers(captured: None) -> None:
    stream, x = cpu_stream(7, 9), torch.randn(STEPS, 3, 7)
    with backend("reference"):
        fork = stream.fork()
        first = stream(x[0])
        kept = first.clone()
        stream(x[1])
        assert torch.equal(first, kept)
        out = torch.empty(3, 9)
        assert fork(x[0], out) is out and torch.equal(out, kept)
        assert not first.requires_grad


def test_states(captured: None) -> None:
    stream, x = cpu_stream(7, 9, num_layers=2), torch.randn(STEPS, 3, 7)
    with backend("reference"):
        fresh = stream(x[0])
        stream.reset()
        assert torch.equal(stream(x[0]), fresh)
        stream.reset([1])
        y = stream(x[0])
        assert torch.equal(y[1], fresh[1]) and not torch.equal(y[0], fresh[0])
        h, c = stream.state
        fork = stream.fork()
        expected = stream(x[1])
        assert torch.equal(fork(x[1]), expected)
        stream.state = h, c
        assert torch.equal(stream(x[1]), expected)
        with torch.no_grad():
            stream._lstm.weight_ih_l0.mul_(2)
        stream.state = h, c
        assert torch.equal(stream(x[1]), expected)
        stream.refresh()
        stream.state = h, c
        assert not torch.equal(stream(x[1]), expected)
        fork.state = h, c
        assert torch.equal(fork(x[1]), expected)


def test_errors_in_the_words_of_the_native_one() -> None:
    stream, native = cpu_stream(7, 9), FusedLSTM(7, 9).stream(3)
    x, h = torch.zeros(3, 7), torch.zeros(1, 3, 9)

    def error(call: Callable[[], object]) -> tuple[type[Exception], str]:
        with pytest.raises(Exception) as raised:  # noqa: PT011, B017  which it is, is compared
            call()
        return raised.type, str(raised.value).replace(" and torch.float32", "")

    def calls(of: Stream) -> list[Callable[[], object]]:
        inputs = [x.double(), x[0], x[None, None], x[:2], torch.zeros(3, 8), x.to("meta")]
        pairs: list[tuple[Tensor, Tensor]] = [(h[0], h), (h, h[..., 1:]), (h.double(), h)]
        return [
            *(lambda given=given: of(given) for given in inputs),
            *(lambda pair=pair: setattr(of, "state", pair) for pair in pairs),
            lambda: of.reset([3]),
        ]

    for ours, theirs in zip(calls(stream), calls(native), strict=True):
        (kind, words), (expected, of_native) = error(ours), error(theirs)
        assert kind is expected, (words, of_native)
        assert words.split(",")[0] == of_native.split(",")[0]
    with pytest.raises(RuntimeError, match="out must be of size"):
        stream(x, torch.zeros(3, 8))
    with backend("reference"), pytest.raises(ValueError, match="keeps its weights in its own"):
        FusedLSTM(7, 9).stream(weights=torch.int8)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "proj_size": 32}], ids=str)
def test_a_graph_gives_the_modules_bits(options: dict[str, int], dtype: torch.dtype) -> None:
    lstm = FusedLSTM(61, 128, device="cuda", dtype=dtype, **options)
    stream, x = lstm.stream(3), torch.randn(STEPS, 3, 61, device="cuda", dtype=dtype)
    output, hx = [], None
    with torch.no_grad():
        for step in x:
            y, hx = lstm(step[None], hx)
            output.append(y[0])
    found = streamed(stream, x)
    assert torch.equal(found["output"], torch.stack(output))
    assert torch.equal(found["h_n"], hx[0]) and torch.equal(found["c_n"], hx[1])
    fork = stream.fork()
    assert torch.equal(fork(x[0]), stream(x[0]))
    stream.reset()
    assert torch.equal(stream(x[0]), output[0])


@pytest.mark.gpu
def test_generate_on_a_gpu() -> None:
    lstm, head = FusedLSTM(61, 96, num_layers=2), torch.nn.Linear(96, 61)
    ids = torch.randint(61, (5, 4))
    expected, _ = generate(lstm, head, ids, length=50, temperature=0)
    found, (h, _) = generate(lstm.cuda(), head.cuda(), ids.cuda(), length=50, temperature=0)
    assert h.is_cuda and torch.equal(found.cpu(), expected)
    generator = torch.Generator("cuda").manual_seed(1)
    drawn, _ = generate(
        lstm, head, ids.cuda(), length=50, top_k=9, top_p=0.9, generator=generator, stop=3
    )
    assert drawn.shape == (5, 50)
