"""FusedLSTM beside nn.LSTM: same weights, same input, same process, alternating calls.

    python -m benchmarks.lstm --suite seeds --device cpu

Prints the machine, then one line per case, dtype and pass; `--out FILE` writes the same as JSON.
Nothing is timed before both sides are seen to agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from benchmarks import machine, report
from benchmarks.suites import FORWARD, SUITES, Case
from benchmarks.timing import clock_for, compare
from fused_lstm import FusedLSTM

RESULTS = Path(__file__).parent / "results"


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


def measure(
    case: Case,
    pass_: str,
    dtype: str,
    device: torch.device,
    *,
    repeats: int,
    min_time: float,
    fused: Callable[..., nn.RNNBase] = FusedLSTM,
) -> dict[str, Any]:
    """One row of the report (report.py).

    `fused` is called as nn.LSTM is. Raises click.ClickException if its results, or its gradients
    where the pass has them, are not those of nn.LSTM.
    """
    precision = DTYPES[dtype]
    if device.type == "cuda":
        # torch allows tf32 in cuDNN by default: "fp32" would be tf32 on one side only.
        torch.backends.cudnn.allow_tf32 = dtype == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    training = pass_ != FORWARD
    torch.manual_seed(0)
    place: dict[str, Any] = {"device": device, "dtype": precision.dtype}
    theirs = nn.LSTM(case.input_size, case.hidden_size, **case.options(), **place).train(training)
    ours = fused(case.input_size, case.hidden_size, **case.options(), **place).train(training)
    # Each side has its own copy of the weights, as two models would.
    ours.load_state_dict(theirs.state_dict())

    D = case.num_layers * (2 if case.bidirectional else 1)
    x = torch.randn(case.T, case.B, case.input_size, **place).requires_grad_(training)
    h_0 = torch.randn(D, case.B, case.proj_size or case.hidden_size, **place)
    c_0 = torch.randn(D, case.B, case.hidden_size, **place)

    with torch.set_grad_enabled(training):
        expected, actual = (results(lstm, x, (h_0, c_0)) for lstm in (theirs, ours))
        check_equal(expected, actual, precision.tolerance, f"{case.name}, {dtype}")
        del expected, actual  # memory that would be in the way of what is timed
        timed = compare(
            step(theirs, x, (h_0, c_0)),
            step(ours, x, (h_0, c_0)),
            clock_for(device),
            repeats=repeats,
            min_time=min_time,
        )
    return {
        "case": case.name,
        "B": case.B,
        "T": case.T,
        "I": case.input_size,
        "H": case.hidden_size,
        **case.options(),
        "dtype": dtype,
        "pass": pass_,
        "torch_ms": report.significant(timed.baseline_ms),
        "fused_ms": report.significant(timed.candidate_ms),
        "ratio": report.significant(timed.ratio),
        "ratio_quartiles": [report.significant(q) for q in timed.ratio_quartiles],
        "pairs": timed.pairs,
        "calls": timed.calls,
    }


def step(lstm: nn.RNNBase, x: Tensor, hx: tuple[Tensor, Tensor]) -> Callable[[], Any]:
    """What is timed: the forward pass, and with gradients enabled the backward pass for the input
    and all weights, which is what a layer amid a model owes in training."""
    if not torch.is_grad_enabled():
        return lambda: lstm(x, hx)
    wanted = [x, *lstm.parameters()]
    return lambda: torch.autograd.grad(lstm(x, hx)[0].sum(), wanted)


def results(lstm: nn.RNNBase, x: Tensor, hx: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """All that `step` computes, by name."""
    output, (h_n, c_n) = lstm(x, hx)
    named = {"output": output, "h_n": h_n, "c_n": c_n}
    if torch.is_grad_enabled():
        wanted = {"input": x, **dict(lstm.named_parameters())}
        gradients = torch.autograd.grad(output.sum(), list(wanted.values()))
        named.update(zip((f"the gradient of {name}" for name in wanted), gradients, strict=True))
    return named


def check_equal(
    expected: dict[str, Tensor], actual: dict[str, Tensor], tolerance: float, where: str
) -> None:
    """Raise click.ClickException where a tensor differs more than `tolerance` x expected's norm."""
    for name, tensor in expected.items():
        truth = tensor.detach().double()
        allowed = tolerance * truth.norm().item()
        error = (actual[name].detach().double() - truth).norm().item()
        if not error <= allowed:  # so that NaN is an error too
            raise click.ClickException(
                f"{where}: {name} is wrong: its distance from nn.LSTM's is {error:.3g} where at "
                f"most {allowed:.3g} was expected. A wrong result is not timed."
            )


@click.command()
@click.option("--suite", type=click.Choice(list(SUITES)), default="seeds", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--case", "names", multiple=True, help="Only this case. May be repeated.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)),
              help="This dtype instead of the suite's. May be repeated.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's]")
@click.option("--repeats", type=click.IntRange(min=2), default=20, show_default=True,
              help="Pairs to time, at least.")  # fmt: skip
@click.option("--min-time", type=click.FloatRange(min=0), default=4.0, show_default=True,
              help="Seconds to go on for in each row, at least.")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write JSON here.")
@click.option("--keep", is_flag=True,
              help="Write JSON to benchmarks/results/<machine>-<suite>-<device>.json.")  # fmt: skip
def main(
    suite: str,
    device: str,
    names: tuple[str, ...],
    dtypes: tuple[str, ...],
    threads: int | None,
    repeats: int,
    min_time: float,
    out: Path | None,
    keep: bool,
) -> None:
    """Time FusedLSTM beside nn.LSTM; a ratio above 1 means that FusedLSTM is the faster."""
    cases = [case for case in SUITES[suite].cases if not names or case.name in names]
    unknown = set(names) - {case.name for case in cases}
    if unknown:
        there = ", ".join(case.name for case in SUITES[suite].cases)
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: suite {suite} has {there}.",
                                 param_hint="--case")  # fmt: skip
    if keep and (names or dtypes):
        raise click.UsageError("--keep is for a whole suite: leave out --case and --dtype.")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("torch sees no CUDA device.", param_hint="--device")
    if device == "cpu" and "tf32" in dtypes:
        raise click.BadParameter("tf32 exists on CUDA only.", param_hint="--dtype")
    if threads is not None:
        torch.set_num_threads(threads)

    place = torch.device(device)
    document: dict[str, Any] = {
        "format": report.FORMAT,
        "benchmark": "lstm",
        "suite": suite,
        "device": device,
        "threads": torch.get_num_threads(),
        "machine": machine.machine(place),
        "versions": machine.versions(place),
        "environment": machine.environment(),
        "load": machine.load(),
        **machine.commit(),
        "rows": [],
    }
    click.echo(report.preamble(document))
    if (document["load"] or 0) > 0.5:
        click.echo("Other programs are running: times will be longer and vary more.", err=True)
    click.echo("\n" + report.heading())
    for case in cases:
        for dtype in dtypes or SUITES[suite].dtypes:
            for pass_ in case.passes:
                row = measure(case, pass_, dtype, place, repeats=repeats, min_time=min_time)
                document["rows"].append(row)
                click.echo(report.line(row))
                if out:
                    report.write(document, out)
    if keep:
        name = f"{machine.machine_slug(document['machine'])}-{suite}-{device}.json"
        report.write(document, RESULTS / name)
        click.echo(f"kept as results/{name}")


if __name__ == "__main__":
    main()
