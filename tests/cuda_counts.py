"""Prints what a step of the CUDA kernels asks of the hardware, counted without a GPU.

    python tests/cuda_counts.py [--H 768] [--B 16] [--operands f16] [--gpu A100]

Each row is the difference of two runs on the emulator (cuda_emulation/), of STEPS steps, on a
device with the multiprocessors and the shared memory of the GPU: what a step adds. The rules are
those of cuda_emulation/counting.h. The last column is the reckoned time of a step: Gpu.step_us.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from cuda_emulation import library

DTYPES = {"f16": torch.float16, "tf32": torch.float32, "f32": torch.float32}
HIDDEN = (96, 512, 768, 1024, 2048)
PASSES = ("forward", "backward")
WARPS_OF_A_SCHEDULER = 2  # a block has eight warps, a multiprocessor four schedulers
STEPS = (5, 11)  # of the two runs: beyond what the kernels prefetch at first


@dataclass(frozen=True)
class Step:
    """What one step adds: of block 0, but for `trips` and `cold_trips`, the longest path."""

    H: int
    pass_: str
    counts: dict[str, float]
    launches: int  # of the whole pass, fills included

    def __getitem__(self, name: str) -> float:
        return self.counts[name]

    @property
    def conflicts(self) -> float:
        """Wavefronts of shared memory beyond the fewest that the accesses could take."""
        return self["wavefronts"] - self["least_wavefronts"]


@dataclass(frozen=True)
class Gpu:
    """What is known of a GPU. Times in microseconds, from measurements that others published."""

    name: str
    multiprocessors: int
    shared_bytes: int  # that a block may ask for
    ghz: float  # highest clock: these kernels use a fraction of the power
    exchange_us: float  # a word published until another block has it
    trip_us: float  # to L2 and back
    memory_us: float  # more, for what is not in L2
    bytes_per_cycle: float  # from L2 into one multiprocessor
    mma_cycles: float  # of m16n8k16 in 16 bits or m16n8k8 in tf32, for one of four schedulers
    cell_cycles: float  # from the last product on: barrier, sums' latency, activations, publishing

    def step_us(self, step: Step) -> float:
        """The sum of what a step does one after the other. Nothing is taken to overlap, so it is an
        upper bound of its parts; plain fp32 multiplications are not in it, they run beside the
        loads from shared memory that they need.

        exchange + (trips - 1) trip + cold trips memory
          + (32 polled sectors / rate + mma x warps of a scheduler x cycles of one
             + wavefronts + barriers x cell) / clock
        """
        cycles = 32 * step["polled"] / self.bytes_per_cycle
        cycles += step["mma"] * WARPS_OF_A_SCHEDULER * self.mma_cycles
        cycles += step["wavefronts"] + self.cell_cycles * step["barriers"]
        waits = self.exchange_us + (step["trips"] - 1) * self.trip_us
        return waits + step["cold_trips"] * self.memory_us + cycles / self.ghz / 1000


# H100: measured by benchmarks/micro.cu and by a profile of the kernels, on one with 80 GB of HBM3:
# the clock while they run, 0.67 mma a cycle and multiprocessor, 440 cycles from the barrier to the
# publication. A100: as others published, none has been measured.
GPUS = {
    "H100": Gpu("H100 SXM, H200", 132, 227 << 10, 1.77, 0.55, 0.25, 0.35, 38, 6, 440),
    "A100": Gpu("A100 SXM", 108, 163 << 10, 1.41, 0.7, 0.25, 0.35, 38, 8, 440),
}


def counted(
    emulation: library.Emulation, gpu: Gpu, pass_: str, operands: str, T: int, B: int, H: int
) -> tuple[dict[str, int], int]:
    """The tally of one pass and its launches; nothing where the step path serves it."""
    dtype = DTYPES[operands]
    weights = [torch.zeros(4 * H, n, dtype=dtype) for n in (1, H)]
    state = torch.zeros(1, B, H, dtype=dtype)
    x = torch.zeros(T, B, 1, dtype=dtype)
    ops = torch.ops.fused_lstm_emulation
    with (
        emulation.device(gpu.multiprocessors, gpu.shared_bytes),
        emulation.schedule(0, "block ahead"),
    ):
        if pass_ == "forward":
            with emulation.counted() as tally:
                ops.lstm_forward(x, None, state, state, weights)
        else:
            gates, cells = (
                torch.zeros(1, T * B, 4 * H, dtype=dtype),
                torch.zeros(1, T * B, H, dtype=dtype),
            )
            output = torch.zeros(T, B, H, dtype=dtype)
            needs = [False] * 5
            with emulation.counted() as tally:
                ops.lstm_backward(output, None, None, x, None, state, state, weights, output,
                                  gates, cells, needs)  # fmt: skip
        counts = emulation.counts()
    return (tally if counts["barriers"] else {}), counts["launches"] + counts["fills"]


def step(
    emulation: library.Emulation,
    pass_: str,
    operands: str,
    H: int,
    B: int = 16,
    gpu: Gpu = GPUS["H100"],
) -> Step | None:
    """What one step adds; None where the step path serves it."""
    with library.tf32(operands == "tf32"):
        few, _ = counted(emulation, gpu, pass_, operands, STEPS[0], B, H)
        many, launches = counted(emulation, gpu, pass_, operands, STEPS[1], B, H)
    if not few:
        return None
    more = STEPS[1] - STEPS[0]
    counts = {name: (many[name] - few[name]) / more for name in few}
    return Step(H, pass_, counts, launches)


COLUMNS = (
    "wavefronts", "least_wavefronts", "trips", "cold_trips", "sectors_read", "polled",
    "sectors_written", "sectors_prefetched", "mma", "barriers",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--H", type=int, nargs="*", default=HIDDEN)
    parser.add_argument("--B", type=int, default=16)
    parser.add_argument("--operands", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    chosen = parser.parse_args()
    gpu = GPUS[chosen.gpu]
    if why := library.why_not():
        sys.exit(f"{Path(__file__).name}: {why}")
    torch.set_num_threads(1)
    folder = Path(tempfile.gettempdir(), "fused_lstm_cuda_emulation")
    folder.mkdir(exist_ok=True)
    emulation = library.kernels(folder)
    print("| H | operands | pass | " + " | ".join(COLUMNS).replace("_", " ") + " | launches | us |")
    print("|---" * (len(COLUMNS) + 5) + "|")
    for H in chosen.H:
        for operands in chosen.operands:
            for pass_ in PASSES:
                found = step(emulation, pass_, operands, H, chosen.B, gpu)
                cells = [f"{found[name]:g}" for name in COLUMNS] if found else ["step path"]
                cells += [str(found.launches), f"{gpu.step_us(found):.2f}"] if found else []
                print(f"| {H} | {operands} | {pass_} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
