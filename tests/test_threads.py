"""How many threads a call takes, and that it ends with any number of them, after fork() too."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fresh_process import run_python
from parity import DTYPES, Options, arguments, results

from fused_lstm import _C, FusedLSTM, backends

# Beside other tests a call may take fewer threads, or calm a crowd.
pytestmark = pytest.mark.alone


@pytest.mark.parametrize(
    ("wanted", "affinity", "quota", "cap", "forked", "expected"),
    [
        (64, 64, 0.0, 0, False, 64),
        (64, 2, 0.0, 0, False, 2),
        (64, 64, 2.0, 0, False, 2),  # a container with two processors of a host of 64
        (64, 64, 1.5, 0, False, 2),
        (64, 64, 0.25, 0, False, 1),
        (4, 8, 16.0, 0, False, 4),
        (8, 8, 0.0, 3, False, 3),
        (2, 8, 0.0, 5, False, 2),  # the cap adds nothing
        (8, 8, 0.0, 0, True, 1),
    ],
)
def test_limit(
    wanted: int, affinity: int, quota: float, cap: int, forked: bool, expected: int
) -> None:
    assert _C.thread_limit(wanted, affinity, quota, cap, forked) == expected


V2, V1 = "0::/a/b\n", "12:cpuset:/a\n4:cpu,cpuacct:/a/b\n1:name=systemd:/a\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {"a/b/cpu.max": "200000 100000"}, 2.0),
        (V2, {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1.5),
        (V2, {"a/cpu.max": "50000 100000", "a/b/cpu.max": "200000 100000"}, 0.5),
        (V2, {"cpu.max": "300000 100000"}, 3.0),  # mounted at the group itself, as in a container
        (V2, {"a/b/cpu.max": "max 100000"}, 0.0),
        (V2, {"a/b/cpu.max": "nonsense"}, 0.0),
        (V1, {f"cpu,cpuacct/a/b/cpu.cfs_{k}_us": v for k, v in
              (("quota", "250000"), ("period", "100000"))}, 2.5),
        (V1, {f"cpu/cpu.cfs_{k}_us": v for k, v in
              (("quota", "400000"), ("period", "100000"))}, 4.0),
        (V1, {f"cpu/a/b/cpu.cfs_{k}_us": v for k, v in
              (("quota", "-1"), ("period", "100000"))}, 0.0),
        ("", {}, 0.0),
        ("no colons", {}, 0.0),
        ("0::no slash\n", {"cpu.max": "300000 100000"}, 3.0),
        ("1:cpu:a/b\n0::\n", {"cpu/cpu.cfs_quota_us": "50000",
                              "cpu/cpu.cfs_period_us": "100000"}, 0.5),
    ],
)  # fmt: skip
def test_quota(tmp_path: Path, groups: str, files: dict[str, str], expected: float) -> None:
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert _C.processor_quota(str(tmp_path / "groups"), str(tmp_path / "mount")) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert _C.processor_quota(str(tmp_path / "none"), str(tmp_path)) == 0.0


WORK = """
import os, sys, torch
from fused_lstm import FusedLSTM, _C
_C.set_any_pace({any_pace})
torch.set_num_threads({threads})
torch.manual_seed(0)
lstm = FusedLSTM(63, 65, 2)
x = torch.randn(3, 17, 63)  # small enough for torch itself to take one thread
def results():
    lstm.zero_grad()
    lstm(x)[0].square().sum().backward()
    return [p.grad.clone() for p in lstm.parameters()]
def same(a, b):
    return all(map(torch.equal, a, b))
"""


def test_calls_take_one_thread_after_a_stall() -> None:
    """For 20 ms, for twice as long each time that the next attempt stalls at once, 2 s at most."""
    ms = 1_000_000
    contention = _C.Contention(20 * ms)
    assert not contention.paused(0)
    contention.report(False, 0, 0)
    assert not contention.paused(1)
    contention.report(True, 9 * ms, 10 * ms)
    assert contention.paused(29 * ms)
    assert not contention.paused(30 * ms)
    now, pause = 30 * ms, 20 * ms
    for _ in range(12):  # again and again, as soon as it is tried
        began, now = now, now + 5 * ms
        contention.report(True, began, now)
        pause = min(2 * pause, 2000 * ms)
        assert contention.paused(now + pause - 1)
        assert not contention.paused(now + pause)
        now += pause
    for _ in range(5):  # once in 100 ms, a stall is an accident, however long a call takes
        now += 100 * ms
        contention.report(True, now, now + 500 * ms)
        now += 520 * ms
        assert contention.paused(now - 1) and not contention.paused(now)


def test_contention_lasts_where_trying_again_stalls() -> None:
    """Until it has gone well for as long as the last pause."""
    contention = _C.Contention(20)
    contention.report(True, 99, 100)
    assert contention.paused(119) and not contention.lasts(119)
    contention.report(True, 120, 120)
    assert contention.lasts(120) and contention.lasts(199)
    assert not contention.lasts(200)


def test_a_processor_that_is_gone_is_no_contention(tmp_path: Path) -> None:
    """A stall counts only where threads have stood in line for a processor meanwhile, for a
    twentieth of the time: a virtual machine's processor may be taken away, and neither a pause nor
    sleeping threads help then. A step of H 96 took 19 ms, not 8, for as long as the process ran."""
    ms = 1_000_000

    def stand(**waited: int) -> None:
        for thread, nanoseconds in waited.items():
            (tmp_path / thread).mkdir(exist_ok=True)
            (tmp_path / thread / "schedstat").write_text(f"123 {nanoseconds} 9\n")

    stand(one=7 * ms, two=0)
    queue = _C.Queue(0, str(tmp_path))
    assert not queue.stood_in(10 * ms)
    stand(one=9 * ms)
    assert queue.stood_in(20 * ms) and not queue.stood_in(21 * ms)
    stand(two=2 * ms)
    assert not queue.stood_in(100 * ms)  # 2 of 79
    stand(two=int(2.9 * ms))
    assert not queue.stood_in(101 * ms)  # too short for another program's turn
    stand(two=4 * ms, three=8 * ms)
    assert queue.stood_in(201 * ms)
    assert _C.Queue(0, str(tmp_path / "none")).stood_in(1)  # nothing is known


CROWD = """
import os, time, torch
from fused_lstm import _C
torch.set_num_threads(2)
x = torch.randn(2, 1 << 20)
threads = lambda: len(os.listdir("/proc/self/task"))
def waiting():  # seconds of processors' time in 40 rests of 5 ms after a parallel region
    used = 0.0
    for _ in range(40):
        x.exp_()
        before = time.process_time()
        time.sleep(0.005)
        used += time.process_time() - before
    return used
awake, alone = waiting(), threads()
_C.keep_crowd(2); _C.keep_crowd(2)
while threads() == alone: time.sleep(0.001)
asleep = waiting()
print(asleep < awake / 4, awake, asleep, threads() - alone)
_C.dismiss_crowd()
while threads() > alone: time.sleep(0.001)
print(waiting() > awake / 4)
_C.keep_crowd(2)  # the process ends with it
"""


@pytest.mark.skipif(
    sys.platform != "linux" or "clang" in str(_C.build_info()["compiler"]), reason="for libgomp"
)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_a_crowd_sends_waiting_threads_to_sleep() -> None:
    """torch's own region leaves a thread that spins for 10 ms, unless there is a crowd."""
    found = run_python("-c", CROWD)
    assert found.returncode == 0, found.stderr
    first, last = found.stdout.splitlines()
    assert first.startswith("True ") and last == "True", found.stdout


BESIDE = """
import os, subprocess, sys, time, torch
from fused_lstm import _C, FusedLSTM
torch.set_num_threads(2)
lstm, x = FusedLSTM(64, 255), torch.randn(64, 31, 64)
def call(): lstm(x)[0].sum().backward()
threads = lambda: len(os.listdir("/proc/self/task"))
for _ in range(3): call()
_C.dismiss_crowd()  # others may be busy already
time.sleep(0.1)
alone = threads()
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"])
          for _ in range(2 * len(os.sched_getaffinity(0)))]
end = time.monotonic() + 120
while threads() <= alone and time.monotonic() < end: call()
for other in others: other.kill()
print(threads() > alone)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or "clang" in str(_C.build_info()["compiler"]), reason="for libgomp"
)
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_calls_beside_busy_processes_bring_the_crowd() -> None:
    found = run_python("-c", BESIDE)
    assert found.stdout == "True\n", found.stderr


def test_brief_calls_take_several_threads_in_a_row() -> None:
    """Not after a rest of 3 ms: to wake another thread takes as long as the call."""
    ms = 1_000_000
    pace = _C.Pace()
    now = 0
    for _ in range(3):
        for before in range(20):
            now += 2 * ms
            assert pace.quick(now) == (before >= 16)
        now += 2 * ms


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor")
def test_a_brief_call_by_itself_wakes_nobody() -> None:
    code = WORK.format(threads=2, any_pace=False) + (
        "with torch.no_grad():\n"
        "    alone = len(os.listdir('/proc/self/task'))\n"
        "    for calls in (1, 100):\n"
        "        for _ in range(calls): lstm(x)\n"
        "        print(len(os.listdir('/proc/self/task')) - alone, end=' ')"
    )
    found = run_python("-c", code)
    assert found.stdout == "0 1 ", found.stderr


@pytest.fixture
def impatient() -> Iterator[None]:
    """Two threads, of which one goes on alone from their first meeting on."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    _C.set_patient(False)
    yield
    _C.set_patient(True)
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "options",
    [
        Options(I=17, H=257, T=9, B=7),
        Options(I=33, H=257, T=65, B=1),  # x W_ih^T of many steps ahead
        Options(I=33, H=257, T=9, B=5, num_layers=2, kind="unsorted"),
        Options(I=17, H=257, T=9, B=9, proj_size=129),
    ],
    ids=["plain", "ahead", "two layers, packed", "projected"],
)
def test_one_thread_that_takes_over_gives_the_same_bits(
    options: Options, dtype: torch.dtype, impatient: None
) -> None:
    def found() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        lstm = FusedLSTM.from_torch(options.lstm().to(dtype))
        return results(lstm, arguments(options, dtype))

    taken_over = found()
    torch.set_num_threads(1)
    for name, tensor in found().items():
        assert torch.equal(taken_over[name], tensor), name


LEAVES = """
import torch
from fused_lstm import FusedLSTM, _C
lstm = FusedLSTM(512, 512, batch_first=False).bfloat16().requires_grad_(False)
x, square = torch.randn(9, 32, 512).bfloat16(), torch.randn(1024, 1024).bfloat16()
torch.set_num_threads(1)
expected = lstm(x)[0]
torch.set_num_threads(2)
_C.set_any_pace(True)
for _ in range(3):
    _C.set_patient(False)
    stream = lstm.stream(32)
    for step in x: stream(step)
    _C.set_patient(True)
    square @ square
    for _ in range(3): print(torch.equal(lstm(x)[0], expected), end=" ")
"""


def test_a_thread_that_leaves_a_pass_early_leaves_nothing_behind() -> None:
    """AMX's tiles keep their configuration from product to product, and others change it."""
    found = run_python("-c", LEAVES)
    assert found.stdout == 9 * "True ", found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_no_more_threads_than_processors() -> None:
    code = WORK.format(threads=16, any_pace=True) + (
        "with torch.no_grad():\n"
        "    before = len(os.listdir('/proc/self/task')); lstm(x)\n"
        "    print(len(os.listdir('/proc/self/task')) - before)"
    )
    found = run_python("-c", code)
    assert int(found.stdout) < len(os.sched_getaffinity(0)), found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="for libgomp")
def test_threads_that_are_bound_are_as_many() -> None:
    """OMP_PROC_BIND leaves the first thread one processor, and the others theirs."""
    code = "import torch; from fused_lstm import _C; print(_C.processors()['affinity'])"
    found = run_python("-c", code, OMP_PROC_BIND="true", OMP_PLACES="cores")
    assert int(found.stdout) == len(os.sched_getaffinity(0)), found.stderr


def test_cap() -> None:
    code = (
        WORK.format(threads=16, any_pace=True)
        + "print(_C.processors()['cap'], same(results(), results()))"
    )
    found = run_python("-c", code, FUSED_LSTM_THREADS="1")
    assert found.stdout == "1 True\n", found.stderr
    table = run_python("-m", "fused_lstm", FUSED_LSTM_THREADS="1").stdout
    assert "FUSED_LSTM_THREADS 1" in table and "\nthreads      1 of " in table


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_forked_child_computes_the_same_bits() -> None:
    """OpenMP's threads are not in it: a parallel region would wait for them for ever."""
    code = (
        WORK.format(threads=2, any_pace=True)
        + """
expected = results()
child = os.fork()
if child == 0:
    import signal
    signal.alarm(60)
    torch.set_num_threads(2)
    os._exit(0 if same(results(), expected) and _C.processors()["forked"] else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), _C.processors()["forked"])
"""
    )
    found = run_python("-c", code)
    assert found.stdout == "0 False\n", found.stdout + found.stderr


def test_the_table_says_how_many() -> None:
    facts = _C.processors()
    assert f"processors {facts['affinity']}" in str(backends())
