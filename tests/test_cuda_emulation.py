"""The CUDA kernels and their host code, executed without a GPU: csrc/cuda on cuda_emulation/.

As everywhere: float64 is the truth, nn.LSTM on the CPU in the tested dtype the yardstick.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cuda_emulation import library
from cuda_emulation.calls import OPERANDS, exact_of, infer, made, run, yardstick_of
from cuda_emulation.library import POLICIES, Emulation
from parity import Options, assert_close, assert_same_bits, results
from torch import Tensor

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))


@pytest.fixture(scope="module")
def emulation(pytestconfig: pytest.Config) -> Emulation:
    return library.kernels(library.folder_of(pytestconfig))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The products here are tiny, and the fibres run in one thread anyway."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What torch allocates is not by chance zero, or the right result of the call before."""
    perturb, libc = -6, ctypes.CDLL(None)  # M_PERTURB of glibc's malloc.h
    if hasattr(libc, "mallopt"):
        libc.mallopt(perturb, 1)  # memory comes filled with 0xfe, and freed memory with 0x01
    yield
    if hasattr(libc, "mallopt"):
        libc.mallopt(perturb, 0)


@dataclass(frozen=True)
class Case:
    """One layer on a device with so many multiprocessors, with so much shared memory each."""

    options: Options
    multiprocessors: int = 4
    persistent: bool = True
    shared_kb: int = 227

    def __str__(self) -> str:
        o = self.options
        name = f"H{o.H}-T{o.T}-B{o.B}-{self.multiprocessors}SM"
        for what, there in (
            ("bidirectional", o.bidirectional),
            ("packed", o.kind == "packed"),
            ("no-bias", not o.bias),
            ("no-hx", not o.given_hx),
            (f"proj{o.proj_size}", o.proj_size),
            ("steps", not self.persistent),
        ):
            name += f"-{what}" if there else ""
        return name


# --- the tests ------------------------------------------------------------------------------------


def schedules(count: int, seed: int) -> list[tuple[int, str]]:
    """Seeds and policies: random first, then the others in turn."""
    others = itertools.cycle(POLICIES[1:])
    chosen = [(seed, "random")] + [
        (seed + n, next(others)) for n in range(1 + seed % (len(POLICIES) - 1), 99)
    ]
    return chosen[:count]


def check(
    emulation: Emulation, case: Case, operands: str, schedules: list[tuple[int, str]]
) -> None:
    """Right to the rule of parity.py under the first schedule, the same bits under the others."""
    stock, args = made(case.options, operands)
    truth = results(exact_of(stock), args.to(torch.float64))
    yardstick = yardstick_of(operands, stock, args.to(OPERANDS[operands]))
    found = None
    for schedule in schedules:
        print("schedule", schedule)
        with (
            emulation.device(case.multiprocessors, case.shared_kb << 10),
            emulation.schedule(*schedule),
        ):
            again = run(operands, stock, args)
            assert emulation.persistent() == case.persistent
        if found is None:
            found = again
            precision = torch.float16 if operands == "tf32" else None  # the same epsilon
            assert_close(found, yardstick, truth, precision)
        else:
            assert_same_bits(again, found, schedule)
    with (
        emulation.device(case.multiprocessors, case.shared_kb << 10),
        emulation.schedule(*schedules[-1]),
    ):
        inferred = infer(operands, stock, args)
    assert found
    assert_same_bits(inferred, {name: found[name] for name in inferred}, "inference")


CASES = [
    # Teams of one to eight blocks.
    Case(Options(H=1, T=7, B=1)),
    Case(Options(H=3, T=4, B=9, bidirectional=True)),
    Case(Options(H=17, T=5, B=3, kind="packed", bias=False)),
    Case(Options(H=33, T=3, B=17, bidirectional=True, kind="packed")),
    Case(Options(H=40, T=5, B=17, bidirectional=True, given_hx=False), multiprocessors=3),
    Case(Options(H=128, T=4, B=9), multiprocessors=8),
    # Teams of 9 blocks: one, one with tiles of 16 rows backward, of 32 forward, two or three.
    Case(Options(H=129, T=5, B=3), multiprocessors=9),
    Case(Options(H=130, T=4, B=17, kind="packed", bidirectional=True), multiprocessors=9),
    Case(Options(H=129, T=4, B=9, kind="packed", bidirectional=True), multiprocessors=18),
    Case(Options(H=140, T=4, B=17), multiprocessors=27),
]


@pytest.mark.parametrize("operands", ["bf16", "f16", "tf32", "f32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_persistent_kernels(emulation: Emulation, case: Case, operands: str, seed: int) -> None:
    chosen = schedules(5 if case.options.H < 129 else 3, seed + CASES.index(case))
    check(emulation, case, operands, chosen)


# Forward, teams with tiles of 32 rows: one, two, and two of 16 where shared memory has no room for
# 32. Backward, the last two, blocks of 32 units: one tile for each team, and two for most of them.
@pytest.mark.parametrize("operands", ["bf16", "f16", "tf32"])
@pytest.mark.parametrize(
    "case",
    [
        Case(Options(H=19, T=4, B=29), 2),
        Case(Options(H=27, T=4, B=47, kind="packed", bidirectional=True), 4),
        Case(Options(H=17, T=3, B=31), 2, shared_kb=100),
        Case(Options(H=41, T=3, B=75), 10),
        Case(Options(H=33, T=3, B=131, kind="packed", bidirectional=True), 20),
    ],
    ids=str,
)
def test_tiles_of_many_rows(emulation: Emulation, case: Case, operands: str, seed: int) -> None:
    check(emulation, case, operands, schedules(3, seed))


# Blocks of 12 units, and of 8: the last block of a team has fewer.
@pytest.mark.parametrize(
    "case",
    [
        Case(Options(H=130, T=4, B=9, kind="packed", bidirectional=True), 22),
        Case(Options(H=143, T=3, B=3), 12),
        Case(Options(H=129, T=4, B=17, kind="packed"), 51),
    ],
    ids=str,
)
def test_plain_products_of_fewer_units(emulation: Emulation, case: Case, seed: int) -> None:
    check(emulation, case, "f32", schedules(3, seed))


# With little shared memory, part of the weights is read from global memory in each step: forward of
# the first, both passes of the second.
@pytest.mark.parametrize(
    ("operands", "H", "shared_kb"),
    [("f32", 400, 227), ("bf16", 1040, 227), ("f32", 400, 48), ("tf32", 700, 40)],
)
def test_weights_that_registers_do_not_hold(
    emulation: Emulation, operands: str, H: int, shared_kb: int, seed: int
) -> None:
    case = Case(Options(H=H, T=3, B=3), multiprocessors=65, shared_kb=shared_kb)
    check(emulation, case, operands, [(seed, "warp ahead")])


def test_no_tiles_of_many_rows_without_room(emulation: Emulation, seed: int) -> None:
    """There would be fewer with 32 rows forward, and with 32 units a block backward; but their
    kernels have no registers for weights that are read anew."""
    case = Case(Options(H=300, T=3, B=33), multiprocessors=21, shared_kb=40)
    check(emulation, case, "bf16", [(seed, "warp ahead")])


@pytest.mark.parametrize("operands", ["bf16", "f16", "f32", "f64"])
@pytest.mark.parametrize(
    "case",
    [
        Case(Options(H=17, T=2, B=3, bidirectional=True), persistent=False),
        Case(Options(H=129, T=4, B=3), multiprocessors=4, persistent=False),
        Case(Options(H=33, T=3, B=65), multiprocessors=1, persistent=False),
        Case(Options(H=17, T=5, B=9, proj_size=5, bidirectional=True), persistent=False),
        Case(Options(H=9, T=5, B=9, proj_size=3, kind="packed", bias=False), persistent=False),
    ],
    ids=str,
)
def test_step_path(emulation: Emulation, case: Case, operands: str, seed: int) -> None:
    check(emulation, case, operands, schedules(1, seed))


@pytest.mark.parametrize("operands", ["bf16", "f16", "tf32", "f32", "f64"])
@pytest.mark.parametrize(
    "options",
    [
        Options(H=1, T=1, B=1),
        Options(I=33, H=17, T=1, B=1, bidirectional=True, bias=False),
        Options(I=65, H=33, T=1, B=3, given_hx=False),
        Options(I=5, H=129, T=1, B=8, bidirectional=True, kind="packed"),
    ],
    ids=str,
)
def test_one_step_of_few_rows(
    emulation: Emulation, options: Options, operands: str, seed: int
) -> None:
    """By one launch, whose sums have one order; the backward takes the step path."""
    check(emulation, Case(options, persistent=False), operands, schedules(3, seed))
    with emulation.schedule(seed, "random"):
        infer(operands, *made(options, operands))
        assert emulation.counts()["launches"] == 1


@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
def test_step_path_in_float64(emulation: Emulation, case: Case, seed: int) -> None:
    check(emulation, replace(case, persistent=False), "f64", schedules(1, seed))


@pytest.mark.parametrize(
    "device",
    [
        {"cooperative": False, "multiprocessors": 9},
        {"capability": (7, 5), "multiprocessors": 9},
        {"shared_bytes": 4096, "multiprocessors": 9},
    ],
    ids=str,
)
def test_devices_without_what_teams_need(
    emulation: Emulation, device: dict[str, Any], seed: int
) -> None:
    stock, args = made(Options(H=129, T=3, B=3), "f32")
    truth = results(exact_of(stock), args.to(torch.float64))
    with emulation.device(**device):
        found = run("f32", stock, args)
        assert not emulation.persistent()
    assert_close(found, results(stock, args), truth)


# --- NaN and infinity -----------------------------------------------------------------------------

ALL_ONES = "the NaN whose bits say that a word is not yet published"
POISONS = [
    (where, what)
    for where in ("input", "h_0", "c_0", "weight_hh_l0", "weight_ih_l0", "cotangent")
    for what in ("nan", "inf", ALL_ONES)
    if (where, what) != ("weight_hh_l0", "inf")  # 0 * inf, where rounding decides about the 0
]


def without_onednn() -> Any:
    """torch's own products: with AMX and an odd K, oneDNN's read one element of the row that
    follows and multiply it by zero, so that a NaN there spreads (torch 2.13)."""
    return torch.backends.mkldnn.flags(enabled=False)


@pytest.mark.parametrize("operands", ["bf16", "f16", "tf32", "f32"])
@pytest.mark.parametrize(
    "case", [Case(Options(H=17, T=4, B=9)), Case(Options(H=129, T=3, B=9), 18)], ids=str
)
def test_nan_and_infinity_pass(emulation: Emulation, case: Case, operands: str, seed: int) -> None:
    stock, args = made(case.options, operands)
    chosen = POISONS if case.options.H < 129 else POISONS[1::4]
    for where, what in chosen:
        module, poisoned = copy.deepcopy(stock), args.to(OPERANDS[operands])
        assert poisoned.hx
        target = {
            "input": poisoned.input[1, 2],
            "h_0": poisoned.hx[0][0, 3],
            "c_0": poisoned.hx[1][0, 4],
            "cotangent": poisoned.cotangents[0][2, 5],
        }.get(where)
        if target is None:
            target = module.get_parameter(where).detach()[case.options.H // 2]
        if what == ALL_ONES:
            target[:1].view(torch.int16 if target.itemsize == 2 else torch.int32).fill_(-1)
        else:
            target[:1] = float(what)
        truth = results(exact_of(module), poisoned.to(torch.float64))
        yardstick = yardstick_of(operands, module, poisoned.to(OPERANDS[operands]))
        with emulation.device(case.multiprocessors), emulation.schedule(seed), without_onednn():
            found = run(operands, module, poisoned)
            assert emulation.persistent()
        print(where, what)
        assert any(not tensor.isfinite().all() for tensor in found.values()) or where == "c_0"
        for name, tensor in found.items():
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(tensor), kind(truth[name])), (name, kind)
        finite = [
            {name: tensor.nan_to_num(0, 0, 0) for name, tensor in tensors.items()}
            for tensors in (found, yardstick, truth)
        ]
        assert_close(*finite, torch.float16 if operands == "tf32" else None)


# --- barriers -------------------------------------------------------------------------------------

BARRIER_CASES = [
    (Case(Options(H=33, T=4, B=9), 1), "bf16"),
    (Case(Options(H=17, T=4, B=9), 1), "f32"),
    (Case(Options(H=129, T=3, B=17), 9), "bf16"),
    (Case(Options(H=129, T=3, B=9), 9), "f32"),
]


def test_every_barrier_is_needed(emulation: Emulation, seed: int) -> None:
    """Without it some schedule gives other numbers or an error."""
    calls = [(case, operands, *made(case.options, operands)) for case, operands in BARRIER_CASES]
    right = []
    for case, operands, stock, args in calls:
        with emulation.device(case.multiprocessors):
            right.append(run(operands, stock, args))
    sites = sorted(emulation.barriers("block") | emulation.barriers("warp"))
    assert {file for file, _ in sites} >= {"forward.cu", "backward.cu"}

    def caught() -> str | None:
        for schedule in schedules(2 * len(POLICIES), seed):
            for (case, operands, stock, args), expected in zip(calls, right, strict=True):
                with (
                    emulation.device(case.multiprocessors, case.shared_kb << 10),
                    emulation.schedule(*schedule),
                ):
                    try:
                        found = run(operands, stock, args)
                        assert_same_bits(found, expected, "without the barrier")
                    except (RuntimeError, AssertionError) as error:
                        return f"{case} {operands} {schedule}: {str(error).splitlines()[0]}"
        return None

    superfluous = []
    for file, line in sites:
        with emulation.dropped(file, line):
            how = caught()
        print(f"{file}:{line}", how)
        if how is None:
            superfluous.append(f"{file}:{line}")
    assert not superfluous
    assert caught() is None


# --- host code ------------------------------------------------------------------------------------


@pytest.mark.parametrize("operands", ["bf16", "f32", "f64"])
@pytest.mark.parametrize("kind", ["3-D", "packed"])
def test_gradients_that_are_not_given_or_not_wanted(
    emulation: Emulation, operands: str, kind: str
) -> None:
    stock, args = made(Options(H=17, T=4, B=3, bidirectional=True, kind=kind), operands)
    names = ["input", "h_0", "c_0", *(name for name, _ in stock.named_parameters())]
    for given in range(3):
        cotangents = [c if n == given else None for n, c in enumerate(args.cotangents)]
        zeros = [c if n == given else c * 0 for n, c in enumerate(args.cotangents)]
        whole = run(operands, stock, replace(args, cotangents=tuple(zeros)))
        for wanted in range(len(names)):
            needs = [n == wanted for n in range(len(names))]
            found = run(operands, stock, replace(args, cotangents=tuple(cotangents)), needs)
            name = f"grad {names[wanted]}"
            torch.testing.assert_close(found[name], whole[name], rtol=0, atol=0)
            for other in set(names) - {names[wanted]}:
                assert found[f"grad {other}"].shape == (0,)


@pytest.mark.parametrize("operands", ["bf16", "f32", "f64"])
def test_strides(emulation: Emulation, operands: str) -> None:
    stock, args = made(Options(H=17, T=4, B=3), operands)
    whole = run(operands, stock, args)

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack((tensor, tensor), -1)[..., 0]

    batch_first = [
        tensor.transpose(0, 1).contiguous().transpose(0, 1)
        for tensor in (args.input.detach(), args.cotangents[0])
    ]
    for input, cotangent in (batch_first, [strided(t) for t in batch_first]):
        given = replace(args, input=input, cotangents=(cotangent, *args.cotangents[1:]))
        assert_same_bits(run(operands, stock, given), whole, "strides")


def test_a_launch_that_fails_is_an_error(emulation: Emulation) -> None:
    """What the device says comes out of the operator as RuntimeError."""
    stock, args = made(Options(H=17, T=4, B=3), "f32")
    with emulation.device(shared_bytes=-1), pytest.raises(RuntimeError, match="invalid launch"):
        run("f32", stock, args)
