"""What a step of the CUDA kernels takes on the GPU at hand, by torch's profiler.

    python -m benchmarks.steps [--out steps.json]        # in python/ of a checkout

A row is one size and dtype: microseconds a step of the forward and of the backward kernel alone, 0
where a product and a fused cell serve each step, and what the pass takes besides, in microseconds a
call: weights packed, buffers filled, the large products, and the rest. The document is report.py's
head with `rows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import machine, report
from benchmarks.measure import DTYPES

SIZES = (  # H, B, T
    (16, 16, 256), (64, 16, 256), (64, 256, 64), (96, 16, 256), (256, 32, 128), (512, 1, 256),
    (512, 16, 256), (512, 128, 100), (768, 16, 1024), (768, 64, 128), (1024, 16, 256),
    (2048, 16, 128),
)  # fmt: skip
KINDS = {
    "forward": ("forward_kernel",),
    "backward": ("backward_kernel",),
    "pack": ("pack_kernel",),
    "fill": ("Memset", "memset"),
    "products": ("gemm", "cutlass", "nvjet", "splitK"),
}


def kind_of(kernel: str) -> str:
    """Which of KINDS a kernel of this name is, or "rest"."""
    named = (kind for kind, words in KINDS.items() if any(word in kernel for word in words))
    return next(named, "rest")


def by_kind(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Microseconds of each kind, from names and microseconds of kernels."""
    sums = dict.fromkeys((*KINDS, "rest"), 0.0)
    for name, us in kernels:
        sums[kind_of(name)] += us
    return sums


def profiled(call: Callable[[], object], calls: int = 3) -> dict[str, float]:
    """Microseconds of each kind in one call."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as run:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    on_gpu = (e for e in run.events() if e.device_type is torch.autograd.DeviceType.CUDA)
    return by_kind((event.name, event.device_time / calls) for event in on_gpu)


def measured(H: int, B: int, T: int, dtype: str) -> dict[str, Any]:
    from fused_lstm import FusedLSTM, backend

    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    place: dict[str, Any] = {"device": "cuda", "dtype": DTYPES[dtype].dtype}
    lstm = FusedLSTM(H, H, **place)
    x = torch.randn(T, B, H, **place, requires_grad=True)
    grad = torch.randn(T, B, H, **place)
    with backend("cuda"):
        us = profiled(lambda: lstm(x)[0].backward(grad))
    steps = {f"{pass_}_us_a_step": us.pop(pass_) / T for pass_ in ("forward", "backward")}
    others = {f"{kind}_us": value for kind, value in us.items()}
    found = {**steps, **others}
    return {"H": H, "B": B, "T": T, "dtype": dtype,
            **{name: report.significant(value) if value else 0.0
               for name, value in found.items()}}  # fmt: skip


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON to write.")
@click.option("--dtype", "dtypes", multiple=True, default=("fp16", "bf16", "tf32", "fp32"),
              type=click.Choice(["fp16", "bf16", "tf32", "fp32"]), show_default=True)  # fmt: skip
def main(out: Path | None, dtypes: tuple[str, ...]) -> None:
    """Microseconds a step of the CUDA kernels, and what a call takes besides."""
    if not torch.cuda.is_available():
        raise click.ClickException("torch sees no NVIDIA GPU on this machine.")
    document = machine.document("steps", "steps", torch.device("cuda"), torch.get_num_threads())
    click.echo(report.preamble(document))
    for H, B, T in SIZES:
        for dtype in dtypes:
            row = measured(H, B, T, dtype)
            document["rows"].append(row)
            click.echo("  ".join(f"{name} {value}" for name, value in row.items()))
            if out:
                report.write(document, out)


if __name__ == "__main__":
    main()
