"""Prints what a step of the CUDA kernels asks of the hardware, counted without a GPU.

    python tests/cuda_counts.py [--markdown] [--H 768] [--B 16]

Each row is the difference of two runs on the emulator (cuda_emulation/), of kSteps steps apart, on
a device with the multiprocessors and the shared memory of an H100: what a step adds. The rules are
those of cuda_emulation/counting.h.
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
MULTIPROCESSORS = 132
STEPS = (5, 11)  # of the two runs: beyond what the kernels prefetch at first


@dataclass(frozen=True)
class Step:
    """What one step adds: of block 0, but for `trips` and `cold_trips`, the longest path."""

    H: int
    operands: str
    pass_: str
    counts: dict[str, float]
    launches: int  # of the whole pass, fills included

    def __getitem__(self, name: str) -> float:
        return self.counts[name]

    @property
    def conflicts(self) -> float:
        """Wavefronts of shared memory beyond the fewest that the accesses could take."""
        return self["wavefronts"] - self["least_wavefronts"]


def counted(
    emulation: library.Emulation, pass_: str, operands: str, T: int, B: int, H: int
) -> tuple[dict[str, int], int]:
    """The tally of one pass and its launches; nothing where the step path serves it."""
    dtype = DTYPES[operands]
    weights = [torch.zeros(4 * H, n, dtype=dtype) for n in (1, H)]
    state = torch.zeros(1, B, H, dtype=dtype)
    x = torch.zeros(T, B, 1, dtype=dtype)
    ops = torch.ops.fused_lstm_emulation
    with emulation.device(MULTIPROCESSORS), emulation.schedule(0, "block ahead"):
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
    emulation: library.Emulation, pass_: str, operands: str, H: int, B: int = 16
) -> Step | None:
    """What one step adds; None where the step path serves it."""
    with library.tf32(operands == "tf32"):
        few, _ = counted(emulation, pass_, operands, STEPS[0], B, H)
        many, launches = counted(emulation, pass_, operands, STEPS[1], B, H)
    if not few:
        return None
    more = STEPS[1] - STEPS[0]
    return Step(H, operands, pass_, {name: (many[name] - few[name]) / more for name in few},
                launches)  # fmt: skip


COLUMNS = (
    "wavefronts", "least_wavefronts", "trips", "cold_trips", "sectors_read", "polled",
    "sectors_written", "sectors_prefetched", "mma", "barriers",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--H", type=int, nargs="*", default=HIDDEN)
    parser.add_argument("--B", type=int, default=16)
    parser.add_argument("--operands", nargs="*", choices=DTYPES, default=list(DTYPES))
    chosen = parser.parse_args()
    if why := library.why_not():
        sys.exit(f"{Path(__file__).name}: {why}")
    torch.set_num_threads(1)
    folder = Path(tempfile.gettempdir(), "fused_lstm_cuda_emulation")
    folder.mkdir(exist_ok=True)
    emulation = library.kernels(folder)
    print("| H | operands | pass | " + " | ".join(COLUMNS).replace("_", " ") + " | launches |")
    print("|---" * (len(COLUMNS) + 4) + "|")
    for H in chosen.H:
        for operands in chosen.operands:
            for pass_ in PASSES:
                found = step(emulation, pass_, operands, H, chosen.B)
                cells = [f"{found[name]:g}" for name in COLUMNS] if found else ["step path"]
                cells += [str(found.launches)] if found else []
                print(f"| {H} | {operands} | {pass_} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
