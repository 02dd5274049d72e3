"""`fused_lstm.Dropout`: its mask, and that it is nn.Dropout otherwise."""

from __future__ import annotations

import math
import os

import pytest
import torch
from fresh_process import run_python
from parity import DTYPES
from torch import Tensor, nn

import fused_lstm
from fused_lstm import _C

ISAS = [name for name, usable in _C.cpu_isas() if usable]


def philox(seed: int, counter: int) -> list[int]:
    """Philox4x32 with 7 rounds, as the paper has it."""
    word, key = [counter % 2**32, counter >> 32, 0, 0], [seed % 2**32, seed >> 32]
    for _ in range(7):
        a, b = word[0] * 0xD2511F53, word[2] * 0xCD9E8D57
        word = [b >> 32 ^ word[1] ^ key[0], b % 2**32, a >> 32 ^ word[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return word


def expected(count: int, keep: float, seed: int) -> list[bool]:
    """Of 64 elements: by halves of 16 bits of words 0 and 1 of eight counters, then of 2 and 3."""
    kept: list[bool] = []
    for block in range(-(-count // 64)):
        words = [philox(seed, 8 * block + n) for n in range(8)]
        for pair in (0, 2):
            for shift in (0, 16):
                halves = (w >> shift & 0xFFFF for of in words for w in of[pair : pair + 2])
                kept += [half < round(keep * 65536) for half in halves]
    return kept[:count]


def mask(count: int, keep: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    found = torch.full((count,), torch.nan, dtype=dtype)
    _C.fill_mask(found, keep, seed)
    return found


def test_philox_is_the_papers() -> None:
    """Random123's known answer for a key and a counter of zeros."""
    assert philox(0, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("count", [1, 15, 63, 64, 65, 1001])
def test_the_mask(count: int, dtype: torch.dtype) -> None:
    """On every instruction set that this processor has."""
    before = _C.cpu_isa()
    for keep, seed in ((0.8, 2**62 + 12345), (0.3, 7), (1.0, 1)):
        ones = torch.tensor(expected(count, keep, seed), dtype=torch.float64)
        multiples = ones / keep if dtype is torch.float64 else (ones / keep).float().to(dtype)
        try:
            for isa in ISAS:
                _C.force_cpu_isa(isa)
                assert torch.equal(mask(count, keep, seed, dtype), multiples), isa
        finally:
            _C.force_cpu_isa(before)


def test_same_mask_for_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(mask(300_001, 0.5, 3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_forked_child_draws_the_same_mask() -> None:
    """By itself: OpenMP's threads are not in it, and would be waited for for ever."""
    code = """
import os, signal, torch
from fused_lstm import _C
torch.set_num_threads(2)
masks = [torch.empty(300_001) for _ in range(2)]
_C.fill_mask(masks[0], 0.5, 3)
child = os.fork()
if child == 0:
    signal.alarm(60)
    torch.set_num_threads(2)
    _C.fill_mask(masks[1], 0.5, 3)
    os._exit(0 if masks[0].numpy().tobytes() == masks[1].numpy().tobytes() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    found = run_python("-c", code)
    assert found.stdout == "0\n", found.stdout + found.stderr


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_elements_are_dropped_independently(p: float) -> None:
    """Means within five of their standard deviations, of neighbours and of other seeds too."""
    count = 1_000_000
    spread = 5 * math.sqrt(p * (1 - p) / count)
    a, b = (mask(count, 1 - p, seed) == 0 for seed in (1, 2))
    assert abs(a.double().mean().item() - p) < spread
    for other in (b, *(a.roll(n) for n in (1, 2, 8, 16, 32, 64, 512))):
        centred = (a.double() - p) * (other.double() - p)
        assert abs(centred.mean().item()) < 5 * p * (1 - p) / math.sqrt(count)


def test_by_torchs_generator() -> None:
    dropout, x = fused_lstm.Dropout(0.4), torch.randn(5, 7, 33)
    torch.manual_seed(1)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first) and not torch.equal(first, second)
    kept = first != 0
    assert torch.equal(first[kept], x[kept] * torch.tensor(1 / 0.6))


@pytest.mark.parametrize("layout", ["dense", "transposed", "strided", "expanded", "empty", "0-D"])
def test_layouts_and_gradient(layout: str) -> None:
    x = torch.ones(33, 65, dtype=torch.float64)
    layouts = {"dense": x, "transposed": x.t(), "strided": x[::2, 1::3], "empty": x[:0]}
    layouts |= {"expanded": x[:, :1].expand(33, 9), "0-D": x[0, 0]}
    x = layouts[layout].detach().requires_grad_()
    y = fused_lstm.Dropout(0.25)(x)
    assert y.shape == x.shape
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)  # of an input of ones


def test_evaluation_and_the_ends_are_torchs() -> None:
    x = torch.randn(3, 5)
    assert fused_lstm.Dropout(0.5).eval()(x) is x
    assert torch.equal(fused_lstm.Dropout(0.0)(x), x)
    assert not fused_lstm.Dropout(1.0)(x).any()
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        fused_lstm.Dropout(1.5)


def test_elsewhere_it_is_nn_dropout() -> None:
    x = torch.randn(7, 9)
    ours, stock = fused_lstm.Dropout(0.5), nn.Dropout(0.5)

    def same(call: object, *inputs: Tensor) -> None:
        results = []
        for module in (ours, stock):
            torch.manual_seed(3)
            results.append(call(module)(*inputs))  # type: ignore[operator]
        assert torch.equal(*results)

    same(lambda module: torch.func.vmap(module, randomness="different"), x)
    same(lambda module: torch.compile(module, backend="aot_eager", fullgraph=True), x)
    same(lambda module: type(module)(0.5, inplace=True), x.clone())
    for forced in ("reference", "cuda", "triton"):  # whether or not they could serve it
        with fused_lstm.backend(forced):
            same(lambda module: module, x)


def test_refuses_what_is_no_mask() -> None:
    with pytest.raises(RuntimeError, match="dense"):
        _C.fill_mask(torch.zeros(4, 6)[:, ::2], 0.5, 1)
    with pytest.raises(ValueError, match="torch.Long"):
        _C.fill_mask(torch.zeros(4, dtype=torch.int64), 0.5, 1)
    with pytest.raises(ValueError, match="probability"):
        _C.fill_mask(torch.zeros(4), 0.0, 1)
