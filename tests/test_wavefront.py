"""Layers of a stack at once (csrc/cpu/wavefront.h): the bits of one layer after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from parity import DTYPES, Options, arguments, call

from fused_lstm import _C, FusedLSTM, explain

CASES = {
    "two layers": Options(I=5, H=33, T=257, B=3, num_layers=2),
    "one sequence": Options(I=65, H=129, T=129, B=1, num_layers=3),
    "packed": Options(I=17, H=65, T=161, B=7, num_layers=2, kind="packed"),
    "unsorted": Options(I=17, H=65, T=161, B=5, num_layers=3, kind="unsorted", bias=False),
    "projected": Options(I=33, H=65, T=131, B=5, num_layers=3, proj_size=19),
    "2-D": Options(I=33, H=65, T=143, num_layers=2, kind="2-D", given_hx=False),
    "eight layers": Options(I=9, H=33, T=131, B=2, num_layers=8, batch_first=True),
}


@pytest.fixture(params=[True, False], ids=["patient", "impatient"])
def crew(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whoever waits; or goes on alone where it would wait for the first time."""
    threads = torch.get_num_threads()
    _C.set_any_pace(True)
    _C.set_patient(request.param)
    yield
    _C.set_patient(True)
    _C.set_any_pace(False)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("options", CASES.values(), ids=list(CASES))
@torch.no_grad()
def test_same_bits(options: Options, dtype: torch.dtype, crew: None) -> None:
    torch.manual_seed(0)
    lstm = FusedLSTM.from_torch(options.lstm().to(dtype))
    args = arguments(options, dtype)
    torch.set_num_threads(1)
    expected = call(lstm, args)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for _ in range(3):
            for ours, theirs in zip(call(lstm, args), expected, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", CASES.values(), ids=list(CASES))
def test_the_cases_are_taken_so(options: Options) -> None:
    batch = 1 if options.kind == "2-D" else options.B
    sizes = (options.T, batch, options.I, options.H, options.proj_size or options.H)
    assert _C.cpu_wavefront("float32", *sizes, options.num_layers, 2)
    assert not _C.cpu_wavefront("float32", *sizes, options.num_layers, 1)


@pytest.mark.parametrize(
    "sizes",
    [
        (257, 3, 33, 33, 33, 1, 2),  # one layer
        (257, 3, 33, 33, 33, 9, 2),  # more than there is room for
        (31, 1, 33, 33, 33, 2, 2),  # too short for chunks
        (257, 65, 33, 33, 33, 2, 2),  # a part of the rows fills a thread's tiles
        (257, 1, 512, 512, 512, 2, 2),  # weights of which each thread has a part
    ],
)
def test_where_it_does_not_pay(sizes: tuple[int, ...]) -> None:
    assert not _C.cpu_wavefront("float32", *sizes)


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="'int8' is none of: float32 float64 bfloat16 float16"):
        _C.cpu_wavefront("int8", 257, 3, 33, 33, 33, 2, 2)


@pytest.mark.skipif(_C.processors()["affinity"] < 2, reason="one processor")
def test_explain_says_so() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    lstm, x = FusedLSTM(33, 33, 2, dropout=0.5), torch.randn(257, 3, 33)
    at_once = f"kernels of {_C.cpu_isa()}, layers at once"
    lstm.eval()
    assert explain(lstm, x).forward == f"kernels of {_C.cpu_isa()}"  # recorded
    with torch.no_grad():
        assert explain(lstm, x).forward == at_once
        assert explain(FusedLSTM(33, 33, 2, bidirectional=True), x).forward != at_once
        lstm.train()
        assert explain(lstm, x).forward != at_once
    torch.set_num_threads(threads)


def test_arguments_that_do_not_fit_are_refused() -> None:
    stack = torch.ops.fused_lstm.lstm_stack_inference
    lstm = FusedLSTM(3, 5, 2)
    x, states = torch.randn(7, 2, 3), torch.zeros(2, 2, 5)
    weights = [weight.detach() for weight in lstm.parameters()]
    with torch.no_grad():
        assert torch.equal(stack(x, None, states, states, weights, 2)[0], lstm(x)[0])
    for wrong in (
        (states, states, weights, 3),
        (states, states, weights, 0),
        (states[0], states, weights, 2),
        (states, states[:1], weights, 2),
        (states, states, weights[:-1], 2),
    ):
        with pytest.raises(RuntimeError, match="fused_lstm: expected for"):
            stack(x, None, *wrong)
    with pytest.raises(RuntimeError, match="expected input of shape"):
        stack(x, None, states, states, weights[4:] + weights[:4], 2)
