"""Reads the machine code that nvcc makes of the persistent kernels.

    python tests/cuda_sass.py [--architecture 90a]

Of each kernel's step loop: how partial sums are stored, what is prefetched, and what first waits
for each load. An instruction of sm_70 and later has, in the upper of its two 64-bit words, a mask
of the six scoreboards that it waits for, and the scoreboard that it releases when its result is
there (Jia and others, arXiv 1804.06826, section 2); what is between is followed along every branch.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from build_stand_ins import ROOT, cuda_toolkit

NONE = 7  # the scoreboard that is none


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers, as "LDG.E.128.STRONG.GPU"
    text: str
    control: int

    @property
    def waits(self) -> int:
        """A bit for each scoreboard."""
        return self.control >> 11 & 0x3F

    @property
    def sets(self) -> int:
        return self.control >> 5 & 7

    @property
    def target(self) -> int | None:
        found = re.search(r"BRA.* 0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None


@dataclass
class Kernel:
    name: str  # as "forward_kernel kF16 16 8": a block's units and the rows of a tile
    instructions: list[Instruction]

    @cached_property
    def at(self) -> dict[int, int]:
        return {one.address: index for index, one in enumerate(self.instructions)}

    @cached_property
    def loop(self) -> range:
        """The step loop: the longest that has a barrier in it."""
        loops = []
        for index, one in enumerate(self.instructions):
            start = self.at.get(one.target) if one.target is not None else None
            if start is not None and start < index:
                inside = self.instructions[start:index]
                if any(other.opcode.startswith(("BAR", "WARPSYNC")) for other in inside):
                    loops.append(range(start, index + 1))
        return max(loops, key=len)

    def opcodes(self, pattern: str) -> Counter[str]:
        """Those of the step loop that match."""
        found = (self.instructions[index].opcode for index in self.loop)
        return Counter(opcode for opcode in found if re.match(pattern, opcode))

    def runs(self, pattern: str, between: str) -> list[int]:
        """How many instructions that match follow each other without one of `between`, in the step
        loop and in the order of their addresses."""
        found, apart = [], True
        for index in self.loop:
            opcode = self.instructions[index].opcode
            if re.match(pattern, opcode):
                found = [*found, 1] if apart else [*found[:-1], found[-1] + 1]
            apart = bool(re.match(between, opcode)) or (apart and not re.match(pattern, opcode))
        return found

    def first_waits(self, pattern: str) -> Counter[str]:
        """What first waits for the loads of the step loop that match, on any path."""
        found: Counter[str] = Counter()
        for index in self.loop:
            one = self.instructions[index]
            if re.match(pattern, one.opcode) and one.sets != NONE:
                found.update(self._waiting(index))
        return found

    def _waiting(self, index: int) -> set[str]:
        scoreboard = 1 << self.instructions[index].sets
        found, seen, todo = set(), set(), [index + 1]
        while todo:
            at = todo.pop()
            if at in seen or at >= len(self.instructions):
                continue
            seen.add(at)
            one = self.instructions[at]
            if one.waits & scoreboard:
                found.add(one.opcode.split(".")[0])
                continue
            conditional = one.text.startswith("@")
            if one.target is not None and one.target in self.at:
                todo.append(self.at[one.target])
            if (one.target is None and one.opcode != "EXIT") or conditional:
                todo.append(at + 1)
        return found


def program(name: str) -> str | None:
    """cuobjdump and nvdisasm: of the toolkit, or of Triton's package."""
    if found := shutil.which(name):
        return found
    folders = [Path(folder, "triton", "backends", "nvidia", "bin") for folder in sys.path]
    folders += sorted(Path("/usr/local").glob("cuda*/bin"))
    return next((str(folder / name) for folder in folders if (folder / name).exists()), None)


def disassembled(nvcc: Path, source: str, operands: str, architecture: str) -> list[Kernel]:
    """The kernels of one source for one kind of operands and one architecture ("90a")."""
    dumper = program("cuobjdump")
    if dumper is None:
        raise LookupError("cuobjdump was not found: it comes with CUDA and with Triton")
    with tempfile.TemporaryDirectory() as folder:
        binary = f"{folder}/kernels.cubin"
        subprocess.run(
            [str(nvcc), *cuda_toolkit.KERNEL_FLAGS, f"-DFUSED_LSTM_OPERANDS={operands}",
             f"-gencode=arch=compute_{architecture},code=sm_{architecture}", "-cubin",
             f"csrc/cuda/{source}", "-o", binary],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
        said = subprocess.run([dumper, "-sass", binary], check=True, capture_output=True, text=True)
    names = subprocess.run(
        ["c++filt"], input=said.stdout, check=True, capture_output=True, text=True
    )
    return [kernel for text in names.stdout.split("Function : ")[1:] if (kernel := read(text))]


LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/"
)


def read(text: str) -> Kernel | None:
    """One function of cuobjdump's output; None if it isn't one of the persistent kernels."""
    title = re.match(r".*?(\w+_kernel)<.*Operands\)(\d), (\d+), (\d)>", text)
    if not title:
        return None
    name = f"{title[1]} {cuda_toolkit.OPERANDS[int(title[2])]} {title[3]} {8 * int(title[4])}"
    instructions = []
    for address, words, upper in LINE.findall(text):
        opcode = re.sub(r"^@!?U?P\w+\s+", "", words).split()[0]
        instructions.append(Instruction(int(address, 16), opcode, words, int(upper, 16) >> 41))
    return Kernel(name, instructions)


POLL = r"LDG\.E\.128\.STRONG\.GPU"
ORDINARY_LOAD = r"LDG\.(?!.*STRONG)"
PRODUCT = r"HMMA"


def report(kernel: Kernel) -> str:
    def words(counter: Counter[str]) -> str:
        return ", ".join(f"{count} {what}" for what, count in sorted(counter.items())) or "none"

    return "\n".join(
        [
            f"{kernel.name}: {len(kernel.loop)} instructions in the step loop",
            f"  stores to shared memory: {words(kernel.opcodes('STS'))}",
            f"  prefetches: {words(kernel.opcodes('CCTL'))}",
            f"  products: {words(kernel.opcodes(PRODUCT))}",
            f"  polled loads without a product between: {kernel.runs(POLL, PRODUCT)}",
            f"  waits first for polled words: {words(kernel.first_waits(POLL))}",
            f"  waits first for other loads: {words(kernel.first_waits(ORDINARY_LOAD))}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", default="90a")
    parser.add_argument("--operands", nargs="*", default=cuda_toolkit.OPERANDS)
    chosen = parser.parse_args()
    nvcc = cuda_toolkit.find("13", sys.path).nvcc
    for source in ("forward.cu", "backward.cu"):
        for operands in chosen.operands:
            for kernel in disassembled(nvcc, source, operands, chosen.architecture):
                print(report(kernel))


if __name__ == "__main__":
    main()
