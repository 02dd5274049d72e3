"""`Sampler` among threads, under Ctrl-C and over a long time."""

from __future__ import annotations

import _thread
import sys
import threading

import pytest
from fresh_process import run_python
from test_generate import Model, prompt
from test_stream_contract import MEMORY

from fused_lstm.generation import Sampler


def test_the_lock_is_let_go_and_a_sampler_is_one_threads() -> None:
    model, ids = Model(), prompt(1)
    sampler = Sampler(model.lstm, model.head)
    worker = threading.Thread(target=sampler.draw, args=(ids, 20_000))
    refused = False
    worker.start()
    while worker.is_alive():
        try:
            sampler.state  # noqa: B018
        except RuntimeError as error:
            refused |= "in use by another thread" in str(error)
    worker.join()
    assert refused


@pytest.mark.parametrize("T", [1, 1_000_000])
def test_ctrl_c(T: int) -> None:
    """A text stops, and a long prompt."""
    model, ids = Model(), prompt(1, T)
    timer = threading.Timer(0.1, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, length=10**9 if T == 1 else 1)
    timer.join()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_draws_take_no_memory() -> None:
    code = """
from fused_lstm.generation import Choice, Sampler
sampler = Sampler(FusedLSTM(61, 16, 2), torch.nn.Linear(16, 61), 3)
choice = Choice(top_k=20, top_p=0.9)
ids = sampler.draw(torch.zeros(3, 1, dtype=torch.int64), 1000, choice)
before = resident()
for _ in range(100):
    ids = sampler.draw(ids[:, -1:], 1000, choice)
print(resident() - before)
"""
    found = run_python("-c", MEMORY + code)
    assert int(found.stdout) < 256 << 10, found.stdout + found.stderr
