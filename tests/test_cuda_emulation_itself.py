"""The emulator that the CUDA kernels are tested on (cuda_emulation/): it does what CUDA does, and
catches what CUDA would not forgive."""

from __future__ import annotations

import ctypes

import pytest
import torch
from cuda_emulation import library
from cuda_emulation.library import POLICIES, Emulation
from torch import Tensor

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
SCHEDULES = [(policy, seed) for policy in POLICIES for seed in range(3)]


@pytest.fixture(scope="module")
def toys(pytestconfig: pytest.Config) -> Emulation:
    return library.toys(library.folder_of(pytestconfig))


def run(toys: Emulation, name: str, *arguments: int | Tensor) -> str | None:
    """Launches a toy; what went wrong, or None."""
    function = getattr(toys.library, f"toy_{name}")
    function.restype = ctypes.c_char_p
    wrong = function(
        *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments)
    )
    return wrong.decode() if wrong else None


@pytest.mark.parametrize(("operands", "K"), [("bf16", 16), ("f16", 16), ("tf32", 8)])
def test_mma_is_a_matrix_product(toys: Emulation, operands: str, K: int) -> None:
    a, b, c = torch.randn(16, K), torch.randn(K, 8), torch.randn(16, 8)
    found = torch.empty(16, 8)
    assert run(toys, "product", ("bf16", "f16", "tf32").index(operands), a, b, c, found) is None
    if operands == "tf32":
        a, b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (a, b))
    else:
        dtype = torch.bfloat16 if operands == "bf16" else torch.float16
        a, b = a.to(dtype), b.to(dtype)
    truth = c.double() + a.double() @ b.double()
    # The sum is cut off to float, not rounded.
    assert (found - truth).abs().max() <= truth.abs().max() * 2**-23


def test_mma_passes_nan_and_infinity_on(toys: Emulation) -> None:
    a, b, c = torch.ones(16, 16), torch.ones(16, 8), torch.zeros(16, 8)
    a[3, 5], a[4, 5], a[4, 6], b[7, 2] = torch.inf, torch.inf, -torch.inf, torch.nan
    found = torch.empty(16, 8)
    assert run(toys, "product", 0, a, b, c, found) is None
    torch.testing.assert_close(found, a @ b, equal_nan=True)


def test_conversions_round_as_torch_does(toys: Emulation) -> None:
    bits = torch.randint(-(2**31), 2**31, (100_000,)).to(torch.int32)
    near_half = torch.randn(100_000) * 10.0 ** torch.randint(-9, 6, (100_000,))
    ties = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    ties = torch.stack((ties, ties.nextafter(torch.tensor(torch.inf)), ties * (1 + 2**-11)))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0, 1e-45])
    values = torch.cat((bits.view(torch.float32), near_half, ties.flatten(), special))

    def convert(to: int, values: Tensor) -> Tensor:
        found = torch.empty_like(values)
        toys.library.toy_convert(
            to, len(values), *(ctypes.c_void_p(t.data_ptr()) for t in (values, found))
        )
        return found

    for to, dtype in ((0, torch.bfloat16), (1, torch.float16)):
        truth = values.to(dtype).float()
        torch.testing.assert_close(convert(to, values), truth, rtol=0, atol=0, equal_nan=True)
    halves = torch.arange(65536, dtype=torch.int32)
    truth = halves.to(torch.int16).view(torch.float16).float()
    found = convert(3, halves.float())
    torch.testing.assert_close(found, truth, rtol=0, atol=0, equal_nan=True)
    tf32 = convert(2, values)
    assert ((tf32.view(torch.int32) & 0x1FFF == 0) | tf32.isnan()).all()
    normal = values.isfinite() & (values.abs() > 1e-37) & (values.abs() < 3.4e38)
    error = ((tf32.double() - values.double()) / values.double())[normal]
    assert error.abs().max() <= 2**-11
    assert convert(2, torch.tensor([1 + 2**-11, -1 - 2**-11])).tolist() == [1 + 2**-10, -1 - 2**-10]
    x = torch.linspace(-30, 30, 1001)
    for to, truth in ((4, torch.exp2(x.double())), (5, 1 / x.double())):
        error = ((convert(to, x) - truth) / truth)[truth.isfinite()]
        assert error.abs().max() <= 2**-22
    limits = torch.tensor([torch.inf, -torch.inf, 0.0, 1e-45, 200.0, -200.0])
    assert convert(4, limits).tolist() == [torch.inf, 0, 1, 1, torch.inf, 0]
    assert convert(5, limits[:4]).tolist() == [0, 0, torch.inf, torch.inf]


@pytest.mark.parametrize(("policy", "seed"), SCHEDULES)
def test_barriers_and_shuffles(toys: Emulation, policy: str, seed: int) -> None:
    values = torch.randint(-99, 99, (9, 256)).float()
    sums, pairs = torch.full((9,), torch.nan), torch.full((9, 256), torch.nan)
    with toys.schedule(seed, policy):
        assert run(toys, "sum", 9, 256, values, sums, pairs) is None
    assert torch.equal(sums, values.sum(1))
    assert torch.equal(pairs, values + values.view(9, 128, 2).flip(2).view(9, 256))


def test_a_missing_barrier_shows(toys: Emulation) -> None:
    values = torch.randint(-99, 99, (9, 256)).float()
    sums, pairs = torch.empty(9), torch.empty(9, 256)
    assert run(toys, "sum", 9, 256, values, sums, pairs) is None
    barrier = min(place for place in toys.barriers("block") if place[0] == "toys.cu")
    caught = []
    with toys.dropped(*barrier):
        for policy, seed in SCHEDULES:
            with toys.schedule(seed, policy):
                assert run(toys, "sum", 9, 256, values, sums, pairs) is None
            caught.append(not torch.equal(sums, values.sum(1)))
    print(f"caught by {sum(caught)} of {len(caught)} schedules")
    assert sum(caught) > len(caught) / 2


def words_told(blocks: int, steps: int) -> int:
    word = 1
    for _ in range(steps - 1):
        word = (1 + word * blocks * (blocks + 1) // 2) % 2**32
    return word


@pytest.mark.parametrize(("policy", "seed"), SCHEDULES)
def test_published_words_arrive(toys: Emulation, policy: str, seed: int) -> None:
    words = torch.empty(9, 4, 4, dtype=torch.int32)
    with toys.schedule(seed, policy):
        assert run(toys, "tell", 4, 9, 1, words) is None
        counts = toys.counts()
    assert (words[-1] & 0xFFFFFFFF == words_told(4, 9)).all()
    assert counts["publications"] == 9 * 4 * 4
    assert counts["together"] == 1


def test_who_does_not_wait_for_words_reads_stale_ones(toys: Emulation) -> None:
    for policy, seed in SCHEDULES:
        words = torch.empty(9, 4, 4, dtype=torch.int32)
        with toys.schedule(seed, policy):
            wrong = run(toys, "tell", 4, 9, 0, words)
        told = (words[-1] & 0xFFFFFFFF == words_told(4, 9)).all()
        assert wrong or not told, (policy, seed)


def test_a_schedule_can_be_repeated(toys: Emulation) -> None:
    def order(seed: int) -> list[int]:
        words = torch.empty(9, 4, 4, dtype=torch.int32)
        with toys.schedule(seed):
            run(toys, "tell", 4, 9, 0, words)
            return [*words.flatten().tolist(), *toys.counts().values()]

    assert order(1) == order(1)
    assert order(1) != order(2)


MISTAKES = (
    None,
    "divergence: .* is at toys.cu:.*, other lanes of its warp at toys.cu:",
    "divergence: .* thread 7 has ended|divergence: .* lanes of its warp ended",
    "divergence: .* thread 7 has ended|divergence: .* threads of its block ended",
    "divergence: .* is at toys.cu:.*, others of its block at toys.cu:",
    r"deadlock: threads wait in block 0 at toys.cu:\d+ \(31\), block 0 for a published word \(1\)",
    r"deadlock: .* block 0 at toys.cu:\d+ \(32\), block 0 for a published word \(32\)",
    "gave up",
    "publishes a word twice",
    "publishes a word that says",
    "misaligned access",
    "memory fault at 0x",
    "memory fault at 0x10$",
    "memory fault at 0x",
    None,
)


@pytest.mark.parametrize("mistake", range(len(MISTAKES)))
@pytest.mark.parametrize("policy", POLICIES)
def test_mistakes_are_errors(toys: Emulation, mistake: int, policy: str) -> None:
    words = torch.empty(8, dtype=torch.int32)
    found: int | Tensor = torch.zeros(1)
    if MISTAKES[mistake] == "memory fault at 0x10$":
        found = ctypes.c_void_p(0x10)
    with toys.schedule(7, policy):
        wrong = run(toys, "mistake", mistake, words, found)
    if expected := MISTAKES[mistake]:
        pytest.raises(RuntimeError, throw, wrong).match(expected)
    else:
        assert wrong is None
    if mistake == len(MISTAKES) - 1:  # read shared memory that nobody wrote
        assert isinstance(found, Tensor) and found.isnan().all()
    assert run(toys, "mistake", 0, words, found) is None  # and the next launch is none the worse


def throw(what: str | None) -> None:
    raise RuntimeError(what)


def test_launches_that_the_device_refuses(toys: Emulation) -> None:
    with toys.device(multiprocessors=3, shared_bytes=1000):
        assert run(toys, "grid", 3, 64, 1000, 1) is None
        assert "too many blocks" in str(run(toys, "grid", 4, 64, 1000, 1))
        assert run(toys, "grid", 4, 64, 1000, 0) is None
        assert "invalid launch" in str(run(toys, "grid", 1, 64, 1001, 0))
        assert "invalid launch" in str(run(toys, "grid", 1, 33, 0, 0))
    with toys.device(cooperative=False):
        assert "no cooperative launches" in str(run(toys, "grid", 1, 64, 0, 1))


def test_a_wait_is_bounded_by_the_clock(toys: Emulation) -> None:
    """However often it is tried: a slow neighbour is no error for a minute."""
    tries = 100 << 10
    try:
        toys.library.emulation_clock(500)  # at each of a hundred looks
        assert run(toys, "wait", tries) is None
        toys.library.emulation_clock(700)
        assert "gave up" in str(run(toys, "wait", tries))
    finally:
        toys.library.emulation_clock(0)
