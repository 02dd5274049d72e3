"""What nvcc made of the step loops: tests/cuda_sass.py's findings, held."""

from __future__ import annotations

import sys

import cuda_sass
import pytest
from build_stand_ins import cuda_toolkit
from cuda_sass import POLL, PRODUCT, Kernel

pytestmark = pytest.mark.timeout(600)

# Polled loads of a group: chunks in flight (product.cuh) times tiles of 8 rows.
TOGETHER = {"forward_kernel kF16 8": 4, "forward_kernel kF16 16": 8,
            "backward_kernel kF16 8": 16, "backward_kernel kF16 16": 12}  # fmt: skip


@pytest.fixture(scope="module", params=["80", "90a"])
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    try:
        nvcc = cuda_toolkit.find("13", sys.path).nvcc
        return [
            kernel
            for source in ("forward.cu", "backward.cu")
            for kernel in cuda_sass.disassembled(nvcc, source, "kF16", request.param)
        ]
    except LookupError as why:
        pytest.skip(str(why))


def test_partial_sums_are_stored_whole(kernels: list[Kernel]) -> None:
    """Forward: what is stored by 4 bytes is c and nothing else."""
    for kernel in kernels:
        if kernel.name.startswith("forward"):
            stores = kernel.opcodes("STS")
            assert stores["STS"] == 1, kernel.name
            assert stores["STS.128"] >= 2, kernel.name


def test_loads_of_a_group_set_out_together(kernels: list[Kernel]) -> None:
    """No product stands between them, and so none waits for one that was issued before it."""
    named = {kernel.name: kernel for kernel in kernels}
    assert named.keys() == TOGETHER.keys()
    for name, together in TOGETHER.items():
        runs = named[name].runs(POLL, PRODUCT)
        assert runs and min(runs) >= together, (name, runs)


def test_the_steps_to_come_are_prefetched(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert kernel.opcodes(r"CCTL\.E\.PF2"), kernel.name
