"""What nvcc made of the step loops: tests/cuda_sass.py's findings, held."""

from __future__ import annotations

import sys

import cuda_sass
import pytest
from build_stand_ins import cuda_toolkit
from cuda_sass import POLL, PRODUCT, Kernel

pytestmark = pytest.mark.timeout(600)

ARCHITECTURES = ["80", "90a"]
# Polled loads of a group: chunks in flight (published.cuh) times tiles of 8 rows.
TOGETHER = {
    "forward_kernel kF16 16 8": 4, "forward_kernel kF16 16 16": 8, "forward_kernel kF16 16 32": 8,
    "backward_kernel kF16 16 8": 16, "backward_kernel kF16 16 16": 12,
    "backward_kernel kF16 32 16": 16,
}  # fmt: skip
CODE_KEPT = 128 << 10  # bytes of instructions that a multiprocessor keeps


def disassembled(operands: str, architecture: str) -> list[Kernel]:
    try:
        nvcc = cuda_toolkit.find("13", sys.path).nvcc
        return [
            kernel
            for source in ("forward.cu", "backward.cu")
            for kernel in cuda_sass.disassembled(nvcc, source, operands, architecture)
        ]
    except LookupError as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    return disassembled("kF16", request.param)


def test_partial_sums_are_stored_whole(kernels: list[Kernel]) -> None:
    """Forward: what is stored by 4 bytes is c, of one cell or two, and nothing else."""
    for kernel in kernels:
        if kernel.name.startswith("forward"):
            stores = kernel.opcodes("STS")
            assert stores["STS"] == (2 if kernel.name.endswith("32") else 1), kernel.name
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_products_go_on_while_the_next_chunks_come(architecture: str) -> None:
    """What first waits for a polled load is the look whether it is there, or what joins a warp, and
    neither a product nor what it reads; and the whole step stays in the cache for instructions."""
    plain = disassembled("kF32", architecture)
    assert len(plain) == 4
    for kernel in plain:
        assert not {"FFMA", "LDS"} & kernel.first_waits(POLL).keys(), kernel.name
        assert len(kernel.loop) * 16 < CODE_KEPT / 2, kernel.name
