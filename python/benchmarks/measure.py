"""Measures one row: FusedLSTM beside nn.LSTM, both seen to agree before either is timed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from benchmarks import published, report
from benchmarks.suites import FORWARD_BACKWARD, FORWARD_GRAPH, Case, Row
from benchmarks.timing import clock_for, compare, time_alone

Make = Callable[..., nn.RNNBase]
States = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Precision:
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


class WrongResult(Exception):
    """A result that is not nn.LSTM's: it is not timed."""


def measure(
    row: Row, device: torch.device, *, repeats: int, min_time: float, fused: Make | None
) -> dict[str, Any]:
    """The row of the report (report.py), without what identifies it.

    `fused` is called as nn.LSTM is; None times nn.LSTM alone. Raises WrongResult if its results,
    or its gradients where the pass has them, are not those of nn.LSTM.
    """
    case, precision = row.case, DTYPES[row.dtype]
    if row.threads is not None:
        torch.set_num_threads(row.threads)
    if device.type == "cuda":
        # torch allows tf32 in cuDNN by default: "fp32" would be tf32 on one side only.
        torch.backends.cudnn.allow_tf32 = row.dtype == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = row.dtype == "tf32"
    elif row.pass_ == FORWARD_GRAPH or row.dtype == "tf32":
        raise ValueError(f"{row.pass_} in {row.dtype} exists on CUDA only")
    training = row.pass_ == FORWARD_BACKWARD
    torch.manual_seed(0)
    place: dict[str, Any] = {"device": device, "dtype": precision.dtype}
    theirs = nn.LSTM(case.input_size, case.hidden_size, **case.options(), **place).train(training)
    x, hx = inputs(case, training, place)
    clock = clock_for(device)

    with torch.set_grad_enabled(training):
        if fused is None:
            call = timed(theirs, x, hx, row.pass_)
            ms, timings, calls = time_alone(call, clock, repeats=repeats, min_time=min_time)
            return with_steps({"torch_ms": report.significant(ms)}, case) | {
                "pairs": timings, "calls": calls,
            }  # fmt: skip
        ours = fused(case.input_size, case.hidden_size, **case.options(), **place).train(training)
        # Each side has its own copy of the weights, as two models would.
        ours.load_state_dict(theirs.state_dict())
        facts: dict[str, Any]
        with forced(row.backend):
            where = f"{case.name}, {row.dtype}"
            facts = {"distance": check_equal(theirs, ours, x, hx, precision.tolerance, where)}
            sides = {"torch": timed(theirs, x, hx, row.pass_),
                     "fused": timed(ours, x, hx, row.pass_)}  # fmt: skip
            if device.type == "cuda" and training:
                facts |= {f"{side}_mib": peak_mib(call, device) for side, call in sides.items()}
                facts["memory_ratio"] = report.significant(
                    facts["fused_mib"] / max(facts["torch_mib"], 1e-3)
                )
            times = compare(
                sides["torch"], sides["fused"], clock, repeats=repeats, min_time=min_time
            )
    measured = {
        "torch_ms": report.significant(times.baseline_ms),
        "fused_ms": report.significant(times.candidate_ms),
    }
    others = published.of({**row.facts(), **measured})
    return {
        **with_steps(measured, case),
        "ratio": report.significant(times.ratio),
        "ratio_quartiles": [report.significant(q) for q in times.ratio_quartiles],
        "pairs": times.pairs,
        "calls": times.calls,
        **facts,
        **({"published": others} if others else {}),
    }


def measure_here(
    row: Row, device: str, repeats: int, min_time: float, alone: bool
) -> dict[str, Any]:
    """`measure` with the library as it is installed, or with nn.LSTM alone."""
    fused: Make | None = None
    if not alone:
        from fused_lstm import FusedLSTM

        fused = FusedLSTM
    place = torch.device(device)
    return measure(row, place, repeats=repeats, min_time=min_time, fused=fused)


def unavailable(names: tuple[str, ...]) -> dict[str, str]:
    """Which of these backends can't be measured, and why."""
    try:
        from fused_lstm import backends
    except (ImportError, OSError) as error:
        why = report.without_paths(str(error)).partition("\n")[0]
        return dict.fromkeys(names, f"fused_lstm can't be imported: {why}")
    missing = {}
    for name in names:
        try:
            line = backends()[name]
        except ValueError as error:  # no such backend
            missing[name] = str(error)
        else:
            missing |= {} if line.available else {name: line.detail}
    return missing


def with_steps(measured: dict[str, Any], case: Case) -> dict[str, Any]:
    """Milliseconds a call, and microseconds a step."""
    steps = {
        key.replace("_ms", "_us_per_step"): report.significant(ms * 1e3 / case.T)
        for key, ms in measured.items()
    }
    return {**measured, **steps}


def inputs(case: Case, training: bool, place: dict[str, Any]) -> tuple[Any, States]:
    """The input, a Tensor or for a case with lengths a PackedSequence, and (h_0, c_0)."""
    D = case.num_layers * (2 if case.bidirectional else 1)
    batch_sizes = case.batch_sizes()
    shape = (case.T, case.B) if batch_sizes is None else (sum(batch_sizes),)
    x = torch.randn(*shape, case.input_size, **place).requires_grad_(training)
    h_0 = torch.randn(D, case.B, case.proj_size or case.hidden_size, **place)
    c_0 = torch.randn(D, case.B, case.hidden_size, **place)
    if batch_sizes is None:
        return x, (h_0, c_0)
    return PackedSequence(x, torch.tensor(batch_sizes)), (h_0, c_0)


def data(x: Any) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def timed(lstm: nn.RNNBase, x: Any, hx: States, pass_: str) -> Callable[[], Any]:
    """What is timed: the forward pass, and with gradients enabled the backward pass for the input
    and all weights, which is what a layer amid a model owes in training."""
    if pass_ == FORWARD_GRAPH:
        return captured(lambda: lstm(x, hx))
    if not torch.is_grad_enabled():
        return lambda: lstm(x, hx)
    wanted = [data(x), *lstm.parameters()]
    return lambda: torch.autograd.grad(data(lstm(x, hx)[0]).sum(), wanted)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """One replay of a CUDA graph of `call`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # handles and workspaces are made outside the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay(keep: Any = results) -> None:  # the results live in the graph's memory
        graph.replay()

    return replay


def forced(backend: str | None) -> Any:
    if backend is None:
        return nullcontext()
    from fused_lstm import backend as force

    return force(backend)


def peak_mib(call: Callable[[], Any], device: torch.device) -> float:
    """MiB that a call needs at its peak, beyond what was allocated before it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return report.significant((torch.cuda.max_memory_allocated(device) - before) / 2**20)


def results(lstm: nn.RNNBase, x: Any, hx: States) -> dict[str, Tensor]:
    """All that `timed` computes, by name."""
    output, (h_n, c_n) = lstm(x, hx)
    named = {"output": data(output), "h_n": h_n, "c_n": c_n}
    if torch.is_grad_enabled():
        wanted = {"input": data(x), **dict(lstm.named_parameters())}
        gradients = torch.autograd.grad(data(output).sum(), list(wanted.values()))
        named.update(zip((f"the gradient of {name}" for name in wanted), gradients, strict=True))
    return named


def check_equal(
    theirs: nn.RNNBase, ours: nn.RNNBase, x: Any, hx: States, tolerance: float, where: str
) -> float:
    """The largest distance of one of ours' results from theirs, relative to the norm of theirs.

    Raises WrongResult where it is more than `tolerance` and that result is also more than twice as
    far from the one in fp64 as theirs is.
    """
    expected, actual = results(theirs, x, hx), results(ours, x, hx)
    truth: dict[str, Tensor] | None = None
    largest = 0.0
    for name, tensor in expected.items():
        error = distance(actual[name], tensor)
        if not error <= tolerance:  # so that NaN is an error too
            truth = truth or in_fp64(theirs, x, hx)
            own, their = (distance(side[name], truth[name]) for side in (actual, expected))
            if not own <= 2 * their:
                raise WrongResult(
                    f"{where}: {name} is wrong: its distance from nn.LSTM's is {error:.3g} of its "
                    f"norm where at most {tolerance:.3g} was expected, and from the result in "
                    f"fp64 {own:.3g} where nn.LSTM's is {their:.3g}. It is not timed."
                )
        largest = max(largest, error)
    return report.significant(largest, 2)


def distance(actual: Tensor, expected: Tensor) -> float:
    expected = expected.detach().double()
    norm = expected.norm().item()
    error = (actual.detach().double() - expected).norm().item()
    return error / norm if norm else error


def in_fp64(lstm: nn.RNNBase, x: Any, hx: States) -> dict[str, Tensor]:
    """nn.LSTM's results with the same weights and input in fp64."""
    options = ("num_layers", "bidirectional", "proj_size")
    exact = nn.LSTM(
        lstm.input_size,
        lstm.hidden_size,
        **{name: getattr(lstm, name) for name in options},
        device=hx[0].device,
        dtype=torch.float64,
    ).train(lstm.training)
    exact.load_state_dict(lstm.state_dict())
    rows = data(x).detach().double().requires_grad_(data(x).requires_grad)
    same = PackedSequence(rows, x.batch_sizes) if isinstance(x, PackedSequence) else rows
    return results(exact, same, (hx[0].double(), hx[1].double()))
