"""Inference over whole sequences: FusedLSTM beside nn.LSTM and, where installed, ONNX Runtime and
OpenVINO, in fp32.

    python -m benchmarks.peers

Each side is a process of its own for 1 and for 2 threads, of which the quicker counts; they take
turns, and a ratio is the median over the rounds of the peer's median call over ours. To be read
against: 1.2 times ONNX Runtime's speed, 1.5 times nn.LSTM's. `fused_ms_threads` has our time with
each number of threads.
"""

from __future__ import annotations

import functools
from statistics import median
from typing import Any

from benchmarks import steppers
from benchmarks.beside import Times, command, summary
from benchmarks.report import significant
from benchmarks.suites import FORWARD, Case, Row
from benchmarks.turns import in_turn, sides_of

SUITE, OURS = "peers", "fp32"
SIDES = ("torch", "onnxruntime", "openvino")
CASES = (
    # pyannote's and Open-Unmix's, live and in batches; then sizes that divide by nothing, too.
    *(Case("diarisation", B, 589, 60, 128, num_layers=2, bidirectional=True) for B in (8, 1)),
    *(Case("separation", B, 255, 512, 256, num_layers=3, bidirectional=True) for B in (1, 4)),
    Case("one-layer", 1, 300, 128, 128),
    Case("layers-2", 4, 200, 96, 96, num_layers=2),
    Case("wide-input", 8, 128, 512, 128),
    Case("layers-3", 2, 100, 300, 300, num_layers=3),
    Case("large", 1, 200, 256, 512),
    Case("large-layers-2", 1, 200, 256, 512, num_layers=2),
    Case("odd-both", 3, 77, 33, 65, bidirectional=True),
    Case("odd-layers-2", 5, 151, 40, 129, num_layers=2),
    Case("odd-both-layers-2", 7, 61, 129, 161, num_layers=2, bidirectional=True),
)


def measured(
    row: Row, peers: tuple[str, ...], threads: tuple[int, ...], rounds: int, seconds: float
) -> dict[str, Any]:
    make = functools.partial(steppers.sequence, case=row.case)
    with sides_of(make, (*peers, OURS), threads) as sides:
        times: Times = {(side.name, side.threads): [] for side in sides}
        for at in range(rounds):
            for side, found in in_turn(sides, at, "timed", seconds, 0.0, 1):
                times[side.name, side.threads].append(found)
    each = {n: median(median(of) for of in times[OURS, n]) for n in threads}
    ours = {str(n): significant(s * 1e3) for n, s in each.items()}
    return summary(times, OURS) | {"fused_ms_threads": ours}


main = command(
    SUITE,
    "Time FusedLSTM over a sequence beside its peers; above 1, FusedLSTM is the faster.",
    [Row(SUITE, case, "fp32", FORWARD) for case in CASES], SIDES, 7, measured,
)  # fmt: skip


if __name__ == "__main__":
    main()
