"""Small runs of FusedLSTM in every dtype, for a checker that makes everything slow.

    compute-sanitizer --tool memcheck python -m benchmarks.small_run --device cuda

Forward, and forward with backward, at sizes that divide by nothing. Each result is held against
nn.LSTM's in fp64 on the CPU, so that nothing but our own kernels runs under the checker; a wrong
one ends the run with status 1.
"""

from __future__ import annotations

from typing import Any

import click
import torch
from torch import nn

from benchmarks.measure import DTYPES, distance, forced, in_fp64, inputs, results
from benchmarks.suites import FORWARD, FORWARD_BACKWARD, Case

TOLERANCE = 0.05  # against fp64, in any dtype: kernels that are broken, not roundings

CASES = (
    Case("odd", B=3, T=5, input_size=7, hidden_size=17),
    Case("wide", B=17, T=3, input_size=33, hidden_size=129),
    Case("all options", 3, 5, 7, 33, num_layers=2, bidirectional=True, proj_size=9, shortest=2),
)


def wrong(case: Case, dtype: str, pass_: str, device: torch.device) -> list[str]:
    """The names of the results that are not nn.LSTM's."""
    from fused_lstm import FusedLSTM

    torch.manual_seed(0)
    training = pass_ == FORWARD_BACKWARD
    place: dict[str, Any] = {"device": device, "dtype": DTYPES[dtype].dtype}
    lstm = FusedLSTM(case.input_size, case.hidden_size, **case.options(), **place).train(training)
    x, hx = inputs(case, training, place)
    with torch.set_grad_enabled(training):
        actual = results(lstm, x, hx)
        exact = nn.LSTM(case.input_size, case.hidden_size, **case.options()).train(training)
        exact.load_state_dict({name: w.cpu().float() for name, w in lstm.state_dict().items()})
        states = (hx[0].cpu(), hx[1].cpu())
        here = x.cpu() if case.shortest is not None else x.detach().cpu().requires_grad_(training)
        expected = in_fp64(exact, here, states)
    return [
        name for name, tensor in expected.items()
        if not distance(actual[name].cpu(), tensor) <= TOLERANCE
    ]  # fmt: skip


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--backend", help="Force this backend of fused_lstm.  [default: its own choice]")
@click.option("--dtype", "only", type=click.Choice(sorted(DTYPES)), help="In this dtype alone.")
def main(device: str, backend: str | None, only: str | None) -> None:
    """Run FusedLSTM at small odd sizes in every dtype, forward and backward."""
    failed = False
    dtypes = [dtype for dtype in DTYPES if device == "cuda" or dtype != "tf32"]
    if only:
        dtypes = [only]
    with forced(backend):
        for dtype in sorted(dtypes, key=("fp32", "bf16", "fp16", "tf32", "fp64").index):
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
                dtype == "tf32"
            )
            for case in CASES:
                for pass_ in (FORWARD, FORWARD_BACKWARD):
                    names = wrong(case, dtype, pass_, torch.device(device))
                    failed = failed or bool(names)
                    words = f"wrong: {', '.join(names)}" if names else "right"
                    click.echo(f"{case.name}, {dtype}, {pass_}: {words}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
