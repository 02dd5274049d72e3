"""The CPU kernel's buffers: reused from call to call, never shared, bounded."""

from __future__ import annotations

import platform
import sys

import pytest
import torch
from fresh_process import run_python

from fused_lstm import FusedLSTM

SCRIPT = """
import resource, torch
from fused_lstm import FusedLSTM
torch.manual_seed(0)
lstm = FusedLSTM(16, 128)
x, ones = torch.randn(600, 16, 16), torch.ones(600, 16, 128)
held = []
def step(length):
    output = lstm(x[:length])[0]
    output.backward(ones[:length])
    held[:] = [output][:{held}]
for _ in range(3):
    step(600)
before = resource.getrusage(resource.RUSAGE_SELF)
for length in {lengths}:
    step(length)
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_minflt - before.ru_minflt, after.ru_maxrss - before.ru_maxrss)
"""


def faults_and_growth(lengths: str, megabytes: int, held: int = 0) -> tuple[int, int]:
    """Page faults, and kilobytes by which the process's peak grew, over the given lengths, while
    the last `held` outputs are kept."""
    script = SCRIPT.format(lengths=lengths, held=held)
    done = run_python("-c", script, FUSED_LSTM_CACHE_MB=str(megabytes), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    faults, growth = done.stdout.split()
    return int(faults), int(growth)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's fault counters")
@pytest.mark.parametrize("held", [0, 1])
def test_buffers_are_reused(held: int) -> None:
    cached, _ = faults_and_growth("[600] * 20", 512, held)
    uncached, _ = faults_and_growth("[600] * 20", 0, held)
    assert cached < uncached / 10, (cached, uncached)


BESIDE = """
import resource, torch
from fused_lstm import FusedLSTM
lstm, head = FusedLSTM(65, 256), torch.nn.Linear(256, 65)
x = torch.randn(64, 32, 65)
def step():
    head(torch.nn.functional.dropout(lstm(x)[0], 0.2)).square().mean().backward()
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(100):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's heap")
def test_tensors_beside_ours_are_not_mapped_anew() -> None:
    """Those of 2 MB, of which a step makes several: some 400 pages a step without a reason. Of
    many steps, for a single one may map a thousand, by where the heap's blocks happen to lie."""
    done = run_python("-c", BESIDE, OMP_NUM_THREADS="1")
    assert int(done.stdout) < 100 * 40, done.stdout + done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes there")
def test_memory_is_flat_over_many_lengths() -> None:
    _, growth = faults_and_growth("range(1, 600)", 512)
    assert growth < 16 * 1024, f"{growth} kB over 599 lengths; the longest takes 50 MB"


def test_results_that_are_still_held_keep_their_values() -> None:
    torch.manual_seed(0)
    lstm = FusedLSTM(8, 129)
    inputs = [torch.randn(70, 17, 8, requires_grad=True) for _ in range(4)]
    held = [lstm(x)[0] for x in inputs]
    copies = [output.detach().clone() for output in held]
    for _ in range(3):  # takes and frees blocks of the same size
        lstm(inputs[0])[0].sum().backward()
    for output, copy in zip(held, copies, strict=True):
        assert torch.equal(output, copy)
    assert len({output.data_ptr() for output in held}) == 4
    expected = [torch.autograd.grad(lstm(x)[0].square().sum(), x)[0] for x in inputs]
    for x, output, gradient in zip(inputs, held, expected, strict=True):
        found = torch.autograd.grad(output.square().sum(), x)[0]
        assert torch.equal(found, gradient)


def test_output_is_a_tensor_like_any_other() -> None:
    output = FusedLSTM(8, 129)(torch.randn(70, 17, 8))[0].detach()
    grown = output.clone()
    first = output[0, 0].clone()
    output.resize_(140, 17, 129)
    assert torch.equal(output[0, 0], first) and torch.equal(output[:70], grown)
    assert torch.equal(output.share_memory_()[0, 0], first)
