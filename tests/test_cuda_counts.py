"""What a step of the CUDA kernels asks of the hardware, counted on the emulator: held number by
number, so that a change that costs a bank conflict or a trip to L2 is seen without a GPU."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import cuda_counts
import pytest
from cuda_emulation import library
from cuda_emulation.library import Emulation

pytestmark = [
    pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not())),
    pytest.mark.timeout(600),
]

# (H, B, operands, pass): wavefronts, of them bank conflicts, trips to L2, mma of a warp, barriers;
# sectors of 32 bytes read and written by block 0. On an H100's 132 multiprocessors.
HELD = {
    (96, 16, "f16", "forward"): (376, 0, 1, 8, 1, 112, 112),
    (96, 16, "f16", "backward"): (136, 0, 1, 4, 1, 304, 64),
    (96, 16, "tf32", "forward"): (376, 0, 1, 8, 1, 160, 112),
    (96, 16, "f32", "backward"): (648, 0, 1, 0, 1, 496, 64),
    (512, 16, "f16", "forward"): (376, 0, 1, 16, 1, 320, 112),
    (512, 16, "f16", "backward"): (136, 0, 1, 16, 1, 1136, 64),
    (512, 16, "tf32", "backward"): (392, 0, 1, 32, 1, 2160, 64),
    (512, 16, "f32", "forward"): (1340, 0, 1, 0, 1, 544, 56),
    (768, 16, "f32", "forward"): (2842, 0, 1, 0, 1, 832, 112),
    (768, 16, "f32", "backward"): (5000, 0, 2, 0, 1, 3184, 64),
    (512, 128, "f16", "forward"): (1120, 0, 1, 64, 1, 1280, 448),
    (512, 128, "f16", "backward"): (800, 0, 1, 64, 1, 2496, 256),
    (768, 16, "f16", "forward"): (376, 0, 1, 24, 1, 448, 112),
    (768, 16, "f16", "backward"): (136, 0, 1, 24, 1, 1648, 64),
}


@pytest.fixture(scope="module")
def emulation(pytestconfig: pytest.Config) -> Emulation:
    return library.kernels(library.folder_of(pytestconfig))


@pytest.mark.parametrize("row", HELD, ids=lambda row: "-".join(map(str, row)))
def test_a_step(emulation: Emulation, row: tuple[int, int, str, str]) -> None:
    H, B, operands, pass_ = row
    found = cuda_counts.step(emulation, pass_, operands, H, B)
    assert found
    names = ("mma", "barriers", "sectors_read", "sectors_written")
    held = found["wavefronts"], found.conflicts, found["trips"], *(found[name] for name in names)
    assert held == HELD[row]
    assert found["cold_trips"] == 0  # all that a step waits for is in L2
    assert found.launches == 3


@pytest.mark.parametrize("pass_", cuda_counts.PASSES)
def test_who_has_one_tile_asks_for_no_word_of_its_own(emulation: Emulation, pass_: str) -> None:
    """Of five teams (backward; forward three) the last has one tile where others have two: it asks
    for the next step's words after it has published its own, or, where each load that is counted
    finds what it was made for, it would wait for ever."""
    gpu = replace(cuda_counts.GPUS["H100"], multiprocessors=10)
    found = cuda_counts.step(emulation, pass_, "f16", 33, 131, gpu)
    assert found and found["barriers"] == 2


def accesses(pytestconfig: pytest.Config, bytes_: int, stride: int) -> dict[str, int]:
    toys = library.toys(library.folder_of(pytestconfig))
    toys.library.toy_access.restype = ctypes.c_char_p
    with toys.counted() as tally:
        assert toys.library.toy_access(bytes_, stride) is None
    return tally


@pytest.mark.parametrize(
    ("bytes_", "stride", "wavefronts", "least"),
    [(4, 1, 1, 1), (4, 0, 1, 1), (4, 2, 2, 1), (4, 32, 32, 1), (4, 33, 1, 1),
     (16, 4, 4, 4), (16, 8, 8, 4), (16, 32, 32, 4), (16, 36, 4, 4)],
)  # fmt: skip
def test_wavefronts(
    pytestconfig: pytest.Config, bytes_: int, stride: int, wavefronts: int, least: int
) -> None:
    """Lanes that store so many bytes each, `stride` words apart."""
    tally = accesses(pytestconfig, bytes_, stride)
    assert (tally["wavefronts"], tally["least_wavefronts"]) == (wavefronts, least)
    assert tally["barriers"] == 1
