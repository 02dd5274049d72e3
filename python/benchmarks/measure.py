"""Measures one row: FusedLSTM beside nn.LSTM, both seen to agree before either is timed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from benchmarks import timing
from benchmarks.report import significant
from benchmarks.suites import FORWARD_BACKWARD, Case, Row
from fused_lstm import FusedLSTM, backend


class Precision(NamedTuple):
    dtype: torch.dtype
    # How far apart, in the 2-norm of a whole tensor relative to its own, two right results may be:
    # several times what nn.LSTM's own differ from fp64. A gate swapped or a bias left out is more.
    tolerance: float


DTYPES = {
    "fp64": Precision(torch.float64, 1e-10),
    "fp32": Precision(torch.float32, 1e-4),
    "tf32": Precision(torch.float32, 1e-2),  # fp32 tensors with tf32 products allowed, CUDA only
    "bf16": Precision(torch.bfloat16, 2e-2),
    "fp16": Precision(torch.float16, 1e-2),
}


BROKEN = 0.05  # as far from fp64 no dtype's roundings are


class Side(NamedTuple):
    """An LSTM and what it is called with; `x` is a Tensor or, where lengths differ, packed."""

    lstm: nn.RNNBase
    x: Any
    hx: tuple[Tensor, Tensor]


class WrongResult(Exception):
    """A result that is not nn.LSTM's: it is not timed."""


def measured(row: Row, device: str, repeats: int, min_time: float) -> dict[str, Any]:
    """What a report says of the row, beyond what identifies it.

    Raises WrongResult if our results, or our gradients where the pass has them, are not those of
    nn.LSTM.
    """
    if row.threads is not None:
        torch.set_num_threads(row.threads)
    with torch.set_grad_enabled(row.pass_ == FORWARD_BACKWARD), forced(row.backend):
        sides = {"torch": prepared("torch", row, device), "fused": prepared("fused", row, device)}
        facts: dict[str, Any] = {"distance": check_equal(sides["torch"], sides["fused"], row)}
        calls = {name: call_of(side) for name, side in sides.items()}
        if device == "cuda" and torch.is_grad_enabled():
            facts |= {f"{name}_mib": peak_mib(call) for name, call in calls.items()}
            facts["memory_ratio"] = significant(facts["fused_mib"] / max(facts["torch_mib"], 1e-3))
        clock = timing.cuda_clock if device == "cuda" else timing.cpu_clock
        times = timing.timed(calls, clock, repeats=repeats, min_time=min_time)
    for name in sides:
        times[f"{name}_us_per_step"] = significant(times[f"{name}_ms"] * 1e3 / row.case.T)
    return times | facts


def checked(row: Row, device: str, **_: Any) -> dict[str, Any]:
    """For a checker that makes everything slow: nothing is timed, and what is held against ours is
    nn.LSTM's in fp64 on the CPU, so that nothing but our own kernels runs under the checker."""
    with torch.set_grad_enabled(row.pass_ == FORWARD_BACKWARD), forced(row.backend):
        side = prepared("fused", row, device)
        actual, expected = results(side), in_fp64(side, row)
    errors = {name: distance(actual[name], of) for name, of in expected.items()}
    wrong = [name for name, error in errors.items() if not error <= BROKEN]
    if wrong:
        raise WrongResult(f"{row.case.name}, {row.dtype}: wrong: {', '.join(wrong)}")
    return {"distance": significant(max(errors.values()), 2)}


def forced(name: str | None) -> Any:
    return backend(name) if name else nullcontext()


def prepared(side: str, row: Row, device: str = "cpu", case: Case | None = None) -> Side:
    """nn.LSTM ("torch") or FusedLSTM ("fused") for the row, or for another case in its place: with
    a copy of its own of the same weights, as two models would have, and the same input."""
    case = case or row.case
    # torch allows tf32 in cuDNN by default: "fp32" would be tf32 on one side only.
    torch.backends.cudnn.allow_tf32 = row.dtype == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = row.dtype == "tf32"
    torch.manual_seed(0)
    place: dict[str, Any] = {"device": device, "dtype": DTYPES[row.dtype].dtype}
    training = row.pass_ == FORWARD_BACKWARD
    make = nn.LSTM if side == "torch" else FusedLSTM
    lstm = make(case.input_size, case.hidden_size, **case.options(), **place).train(training)
    D = case.num_layers * (2 if case.bidirectional else 1)
    batch_sizes = case.batch_sizes()
    shape = (case.T, case.B) if batch_sizes is None else (case.N,)
    x: Any = torch.randn(*shape, case.input_size, **place).requires_grad_(training)
    if batch_sizes is not None:
        x = PackedSequence(x, torch.tensor(batch_sizes))
    h_0 = torch.randn(D, case.B, case.proj_size or case.hidden_size, **place)
    return Side(lstm, x, (h_0, torch.randn(D, case.B, case.hidden_size, **place)))


def data(x: Any) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def call_of(side: Side) -> Callable[[], Any]:
    """What is timed: the forward pass, and with gradients enabled the backward pass for the input
    and all weights, which is what a layer amid a model owes in training."""
    lstm, x, hx = side
    if not torch.is_grad_enabled():
        return lambda: lstm(x, hx)
    wanted = [data(x), *lstm.parameters()]
    return lambda: torch.autograd.grad(data(lstm(x, hx)[0]).sum(), wanted)


def peak_mib(call: Callable[[], Any]) -> float:
    """MiB that a call needs on the GPU at its peak, beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return significant((torch.cuda.max_memory_allocated() - before) / 2**20)


def results(side: Side) -> dict[str, Tensor]:
    """All that a call computes, by name."""
    output, (h_n, c_n) = side.lstm(side.x, side.hx)
    named = {"output": data(output), "h_n": h_n, "c_n": c_n}
    if torch.is_grad_enabled():
        wanted = {"input": data(side.x), **dict(side.lstm.named_parameters())}
        gradients = torch.autograd.grad(data(output).sum(), list(wanted.values()))
        named.update(zip((f"the gradient of {name}" for name in wanted), gradients, strict=True))
    return named


def check_equal(theirs: Side, ours: Side, row: Row) -> float:
    """The largest distance of one of ours' results from theirs, relative to the norm of theirs.

    Raises WrongResult where it is more than the dtype's tolerance and that result is also more than
    twice as far from the one in fp64 as theirs is.
    """
    tolerance = DTYPES[row.dtype].tolerance
    expected, actual = results(theirs), results(ours)
    errors = {name: distance(actual[name], of) for name, of in expected.items()}
    wrong = [name for name, error in errors.items() if not error <= tolerance]  # NaN is wrong too
    truth = in_fp64(theirs, row, theirs.hx[0].device) if wrong else {}
    for name in wrong:
        own, their = (distance(of[name], truth[name]) for of in (actual, expected))
        if not own <= 2 * their:
            raise WrongResult(
                f"{row.case.name}, {row.dtype}: {name} is wrong: its distance from nn.LSTM's is "
                f"{errors[name]:.3g} of its norm where at most {tolerance:.3g} was expected, and "
                f"from the result in fp64 {own:.3g} where nn.LSTM's is {their:.3g}."
            )
    return significant(max(errors.values()), 2)


def distance(actual: Tensor, expected: Tensor) -> float:
    expected = expected.detach().double()
    norm = expected.norm().item()
    error = (actual.detach().to(expected) - expected).norm().item()
    return error / norm if norm else error


def in_fp64(side: Side, row: Row, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """nn.LSTM's results with the same weights and input, in fp64 on this device."""
    exact = prepared("torch", replace(row, dtype="fp64"), str(device))
    exact.lstm.load_state_dict(side.lstm.state_dict())
    with torch.no_grad():
        for to, of in zip((data(exact.x), *exact.hx), (data(side.x), *side.hx), strict=True):
            to.copy_(of)
    return results(exact)
