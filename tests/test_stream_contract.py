"""`FusedLSTM.stream`: what it refuses, streams in several threads, and memory."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from fresh_process import run_python
from torch import Tensor, nn

from fused_lstm import FusedLSTM
from fused_lstm.stream import Stream

BFLOAT16, INT8 = torch.bfloat16, torch.int8

# --- errors ---------------------------------------------------------------------------------------


def test_streams_that_can_not_be() -> None:
    with pytest.raises(ValueError, match="one direction"):
        FusedLSTM(3, 5, bidirectional=True).stream()
    lstm = FusedLSTM(3, 5)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        lstm.stream(0)
    with pytest.raises(ValueError, match="no stream computes in torch.int8"):
        lstm.stream(dtype=INT8)
    for dtype, weights in (
        (torch.float32, torch.float16),
        (torch.float64, INT8),
        (torch.float64, BFLOAT16),
        (torch.float16, BFLOAT16),
        (torch.float32, torch.float64),
    ):
        with pytest.raises(ValueError, match=f"no stream in {dtype} keeps its weights in"):
            lstm.stream(dtype=dtype, weights=weights)
    lstm.weight_hh_l0 = nn.Parameter(torch.zeros(20, 4))
    with pytest.raises(RuntimeError, match="weight_hh_l0 must have the shape"):
        lstm.stream()


@pytest.mark.parametrize(
    ("input", "error", "words"),
    [
        ([[1.0]], TypeError, "input must be a Tensor, not list"),
        (torch.zeros(2, 3).double(), ValueError, "RNN input dtype (torch.float64) does not match"),
        (torch.zeros(3), ValueError, "LSTM: Expected input to be 2D or 3D, got 1D instead"),
        (torch.zeros(1, 1, 2, 3), ValueError, "LSTM: Expected input to be 2D or 3D, got 4D"),
        (torch.zeros(2, 4), RuntimeError, "must be equal to input_size. Expected 3, got 4"),
        (torch.zeros(3, 3), RuntimeError, "the stream's batch_size. Expected 2, got 3"),
        (torch.zeros(2, 3, device="meta"), RuntimeError, "input is on meta"),
        (torch.zeros(2, 3).to_sparse(), RuntimeError, "Sparse"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_inputs_that_do_not_fit(input: object, error: type[Exception], words: str) -> None:
    stream = FusedLSTM(3, 5).stream(2)
    with pytest.raises(error) as raised:
        stream(input)  # type: ignore[arg-type]
    assert words in str(raised.value)
    assert not stream.state[0].any()


def test_outs_and_states_that_do_not_fit() -> None:
    stream, x = FusedLSTM(3, 5).stream(2), torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=r"out must be of size \(2, 5\), got \[2, 4\]"):
        stream(x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="out must be of dtype torch.float32"):
        stream(x, torch.zeros(2, 5).half())
    with pytest.raises(RuntimeError, match="dense in its last dimension"):
        stream(x, torch.zeros(5, 2).t())
    with pytest.raises(RuntimeError, match="requires a gradient"):
        stream(x, torch.zeros(2, 5, requires_grad=True))
    with pytest.raises(TypeError, match="out must be a Tensor, not int"):
        stream(x, 1)  # type: ignore[arg-type]
    h = torch.zeros(1, 2, 5)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 5\), got"):
        stream.state = h[0], h
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 2, 5\), got"):
        stream.state = h, torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="h_0 must be of dtype torch.float32"):
        stream.state = h.double(), h


# --- threads and memory ---------------------------------------------------------------------------


def test_ten_threads_with_a_stream_each() -> None:
    lstm = FusedLSTM(65, 129, 2)
    inputs = torch.randn(10, 40, 1, 65)
    stream = lstm.stream()
    expected = [stream.fork()(x) for x in inputs]
    found: dict[int, Tensor] = {}

    def work(index: int, own: Stream) -> None:
        found[index] = torch.stack([own(x) for x in inputs[index]])

    workers = [threading.Thread(target=work, args=(i, stream.fork())) for i in range(10)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index, tensor in enumerate(expected):
        assert torch.equal(found[index], tensor)


def test_one_stream_in_two_threads_is_an_error() -> None:
    """A long call lets the other thread run, and that one is told."""
    stream, x = FusedLSTM(256, 256).stream(), torch.randn(4000, 1, 256)
    refused = []

    def call(input: Tensor) -> None:
        try:
            stream(input)
        except RuntimeError as error:  # either one's: a single step is long enough, too
            refused.append(str(error))

    worker = threading.Thread(target=call, args=(x,))
    worker.start()
    while worker.is_alive():
        call(x[0])
    worker.join()
    assert refused
    assert all("in use by another thread" in words for words in refused)
    stream(x[0])


MEMORY = """
import torch
from fused_lstm import FusedLSTM
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
torch.set_num_threads(1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_steps_take_no_memory() -> None:
    code = """
stream, x = FusedLSTM(8, 16, 2).stream(), torch.randn(1, 8)
for step in range(101_000):
    if step == 1000:
        before = resident()
    stream(x)
print(resident() - before)
"""
    found = run_python("-c", MEMORY + code)
    assert int(found.stdout) < 256 << 10, found.stdout + found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("weights", "width"), [("None", 4), ("torch.bfloat16", 2), ("torch.int8", 1)]
)
def test_weights_are_kept_once_at_their_width(weights: str, width: int) -> None:
    code = f"""
lstm = FusedLSTM(512, 768, 2)
lstm.stream()(torch.zeros(1, 512))  # whatever a first stream brings along
before = resident()
streams = [lstm.stream(weights={weights})]
streams += [streams[0].fork() for _ in range(5)]
grown = resident() - before
print(grown, *streams[0].nbytes, sum(w.numel() for w in lstm.parameters() if w.dim() == 2))
"""
    found = run_python("-c", MEMORY + code)
    grown, weight_bytes, state_bytes, numbers = map(int, found.stdout.split())
    assert numbers * width <= weight_bytes <= numbers * width * 1.02, found.stdout
    assert state_bytes < 2 * 4 * (3 * 768 * 2)
    assert grown < weight_bytes * 1.1 + (2 << 20), found.stdout
