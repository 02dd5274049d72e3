"""What the CUDA kernels ask of a multiprocessor: nvcc's report, held to limits.

nvcc compiles every kernel for sm_80 and sm_90a, with setup.py's flags; neither a GPU nor a torch
with CUDA is needed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from build_stand_ins import ROOT, cuda_toolkit

SOURCES = Path("csrc", "cuda")
pytestmark = [
    pytest.mark.skipif(not list((ROOT / SOURCES).glob("*.cu")), reason="no CUDA kernels here"),
    pytest.mark.timeout(1200),
]

# Of each kernel, the most registers of a thread and KiB of shared memory of a block, on either
# architecture; of the persistent ones for a block's units and the rows of a tile.
# Registers as nvcc 13.0 counts them, rounded up to the 8 that they are handed out by; shared memory
# as plan.cpp asks for at the sizes below.
LIMITS: dict[str, tuple[int, int]] = {
    "backward_kernel kBf16 16 16": (256, 56),
    "backward_kernel kBf16 16 8": (256, 49),
    "backward_kernel kBf16 32 16": (256, 212),
    "backward_kernel kF16 16 16": (256, 56),
    "backward_kernel kF16 16 8": (256, 49),
    "backward_kernel kF16 32 16": (256, 212),
    "backward_kernel kF32 16 8": (256, 225),
    "backward_kernel kTf32 16 16": (256, 180),
    "backward_kernel kTf32 16 8": (256, 177),
    "backward_kernel kTf32 32 16": (256, 226),
    "backward_step_kernel": (64, 0),
    "forward_kernel kBf16 16 16": (256, 73),
    "forward_kernel kBf16 16 32": (256, 197),
    "forward_kernel kBf16 16 8": (256, 45),
    "forward_kernel kF16 16 16": (256, 73),
    "forward_kernel kF16 16 32": (256, 197),
    "forward_kernel kF16 16 8": (256, 45),
    "forward_kernel kF32 12 8": (248, 149),
    "forward_kernel kF32 16 8": (256, 225),
    "forward_kernel kF32 8 8": (256, 103),
    "forward_kernel kTf32 16 16": (256, 197),
    "forward_kernel kTf32 16 32": (256, 195),
    "forward_kernel kTf32 16 8": (256, 173),
    "forward_step_kernel": (64, 0),
    "pack_kernel": (64, 0),
    "single_step_kernel": (152, 0),
    "sum_kernel": (40, 0),
    "upload_kernel": (32, 0),
}

SIZES = "64, 96, 128, 256, 512, 768, 1024"  # H, each with B 1, 16 and 128

# Prints a row of LIMITS and the bytes of shared memory for each plan on an A100 and on an H100.
PLANS = """
#include <cstdio>
#include "cuda/plan.h"
using namespace fused_lstm::cuda;
int main() {
  const char* names[] = {"kBf16", "kF16", "kTf32", "kF32"};
  for (Device device : {Device{108, 166912, 8, 0, true}, Device{132, 232448, 9, 0, true}})
    for (Pass pass : {kForward, kBackward})
      for (Operands operands : {kBf16, kF16, kTf32, kF32})
        for (int H : {%s})
          for (int B : {1, 16, 128}) {
            const Plan p = plan(device, pass, operands, 1024, B, H, 1);
            if (!p.persistent) continue;
            std::printf("%%s_kernel %%s %%d %%d %%d\\n", pass == kForward ? "forward" : "backward",
                        names[operands], p.units, p.tile_rows, p.shared_bytes);
          }
}
"""


def nvcc() -> Path:
    for major in ("13", "12"):
        try:
            return cuda_toolkit.find(major, sys.path).nvcc
        except LookupError as why:
            reason = str(why)
    pytest.skip(reason)


@dataclass
class Kernel:
    """One instantiation for one architecture, as ptxas reports it."""

    name: str
    architecture: str
    stack: int
    spilled: int
    registers: int
    shared: int  # bytes, known when compiled

    @property
    def row(self) -> str:
        """That of LIMITS: the function, and for the persistent ones what plan.h distinguishes."""
        found = re.search(r"(\w+)(?:<(.*)>)?\(", self.name.replace("(anonymous namespace)", ""))
        assert found, self.name
        function, arguments = found[1], found[2] or ""
        if function not in ("forward_kernel", "backward_kernel"):
            return function
        operands, units, tiles = re.findall(r"Operands\)(\d), (\d+), (\d)", arguments)[0]
        return f"{function} {cuda_toolkit.OPERANDS[int(operands)]} {units} {8 * int(tiles)}"


REPORT = re.compile(
    r"Compiling entry function '(?P<name>.*)' for '(?P<architecture>\w+)'\n"
    r"(?:.*\n)?? *(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers(?:.*?, (?P<shared>\d+) bytes smem)?"
)


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What nvcc and ptxas say of all kernels, with C++ names."""
    program, folder = str(nvcc()), tmp_path_factory.mktemp("cuda")
    architectures = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ("80", "90a")]
    flags = [*cuda_toolkit.KERNEL_FLAGS, *architectures, "-Xptxas=-v"]

    def compile(unit: tuple[str, Path, list[str]]) -> str:
        name, source, defines = unit
        target = folder / f"{Path(name).name}"
        command = [program, *flags, *defines, "-c", str(source), "-o", str(target)]
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    with ThreadPoolExecutor(2) as pool:
        said = "".join(pool.map(compile, cuda_toolkit.kernel_objects(ROOT / SOURCES)))
    done = subprocess.run(["c++filt"], input=said, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="session")
def kernels(report: str) -> list[Kernel]:
    found = [
        Kernel(
            name=one["name"],
            architecture=one["architecture"],
            stack=int(one["stack"]),
            spilled=int(one["stores"]) + int(one["loads"]),
            registers=int(one["registers"]),
            shared=int(one["shared"] or 0),
        )
        for one in REPORT.finditer(report)
    ]
    assert len(found) == report.count("Compiling entry function") > 0
    assert {kernel.architecture for kernel in found} == {"sm_80", "sm_90a"}
    return found


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The shared memory, in bytes, that plan.cpp asks for, by the rows of LIMITS: the most."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "main.cpp").write_text(PLANS % SIZES)
    command = ["c++", "-std=c++17", "-Icsrc", f"{folder}/main.cpp", str(SOURCES / "plan.cpp")]
    subprocess.run([*command, "-o", f"{folder}/main"], cwd=ROOT, check=True)
    said = subprocess.run([f"{folder}/main"], capture_output=True, text=True, check=True).stdout
    most: dict[str, int] = {}
    for line in said.splitlines():
        row, _, size = line.rpartition(" ")
        most[row] = max(most.get(row, 0), int(size))
    return most


def test_no_warnings(report: str) -> None:
    assert not [line for line in report.splitlines() if "warning" in line.lower()]


def test_nothing_spills(kernels: list[Kernel]) -> None:
    assert not [kernel for kernel in kernels if kernel.stack or kernel.spilled]


def test_registers_and_shared_memory(kernels: list[Kernel], planned: dict[str, int]) -> None:
    used: dict[str, tuple[int, int]] = {}
    for kernel in kernels:
        registers, shared = used.get(kernel.row, (0, 0))
        used[kernel.row] = max(registers, kernel.registers), max(shared, kernel.shared)
    assert planned.keys() == {row for row in used if re.match("(for|back)ward_kernel", row)}
    for row, dynamic in planned.items():
        used[row] = used[row][0], used[row][1] + dynamic
    print("measured:")
    for row in sorted(used):
        registers, shared = used[row]
        print(f'    "{row}": ({-(-registers // 8) * 8}, {-(-shared // 1024)}),')
    assert used.keys() == LIMITS.keys(), "LIMITS holds the rows measured, and no others"
    beyond = {
        row: (registers, shared, LIMITS[row])
        for row, (registers, shared) in used.items()
        if registers > LIMITS[row][0] or shared > LIMITS[row][1] * 1024
    }
    assert not beyond
