"""charlm train in several processes, by torchrun: the loss of one, and what a death leads to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from charlm.batches import IGNORED, Share, Windows, cut
from charlm.cli import main
from charlm.corpus import builtin_text
from charlm.processes import Processes
from charlm.runfolder import RunFolder
from click.testing import CliRunner

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform != "linux", reason="needs gloo, and /proc"
)
SMALL = ["--hidden", "17", "--window", "17", "--embedding", "5", "--length", "20"]
TEXT = 12_000


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(builtin_text()[:TEXT], encoding="utf-8")
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)  # a resumed run has as many as it had


def torchrun(processes: int, *arguments: object) -> subprocess.Popen[str]:
    """The README's form of the command."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes), "-m", "--", "charlm", "train", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def trained(processes: int, *arguments: object) -> str:
    if processes == 1:
        result = CliRunner().invoke(main, ["train", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output
    running = torchrun(processes, *arguments)
    output, errors = running.communicate(timeout=200)
    assert running.returncode == 0, output + errors
    return output


def losses(run: str) -> list[tuple[float, float | None]]:
    records = RunFolder(Path(run)).read_metrics()
    return [(record.train_loss, record.val_loss) for record in records]


def distance(one: str, other: str) -> float:
    pairs = zip(losses(one), losses(other), strict=True)
    return max(abs(a - b) for left, right in pairs for a, b in zip(left, right, strict=True))  # type: ignore[operator]


@pytest.mark.parametrize(
    "batches",
    [
        # 127 windows: the last batch has one row, for two processes
        ["--batch-size", 9, "--batches", "windows", "--stride", 85, "--eval-train"],
        ["--batch-size", 7, "--accumulate", 2, "--fsdp", "--layers", 2],
    ],
    ids=["windows", "rows, shares"],
)
def test_two_processes_give_the_loss_of_one(batches: list[object]) -> None:
    shared = [
        *SMALL,
        *batches,
        "--text",
        "text.txt",
        "--epochs",
        2,
        "--eval-every",
        0,
        "--dropout",
        0,
    ]
    for processes in (1, 2):
        output = trained(processes, *shared, "--run", f"run{processes}")
    assert output.count("saved in run2") == 1 and output.count("parameters") == 1, output
    assert len(losses("run1")) == 2 and None not in losses("run1")[0]
    assert distance("run1", "run2") < 1e-5


def test_a_killed_process_ends_the_others_and_any_number_goes_on() -> None:
    shared = ["--batch-size", 7, "--dropout", 0, "--text", "text.txt", "--steps", 700]
    options = [*SMALL, *shared, "--eval-every", 100, "--checkpoint-every", 10]
    trained(1, *options, "--run", "whole")
    running = torchrun(2, *options, "--run", "killed")
    wait_for(lambda: len(read("killed/metrics.jsonl")) >= 2)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, errors = running.communicate(timeout=60)
    assert running.returncode != 0 and "saved in" not in output
    assert "charlm" in errors and "SIGKILL" in errors, errors
    output = trained(1, "--resume", "killed")
    assert "the number of processes was 2 and is 1" in output
    assert distance("whole", "killed") < 1e-4


def test_a_resumed_run_of_two_has_the_bits_of_one_that_was_not_interrupted() -> None:
    """Of shares of the weights: the bits of whole ones are no other code's."""
    options = [*SMALL, "--fsdp", "--batch-size", 7, "--dropout", 0.5, "--text", "text.txt"]
    options += ["--schedule", "constant", "--warmup", 0, "--eval-every", 0]
    trained(2, *options, "--epochs", 3, "--run", "whole")
    trained(2, *options, "--epochs", 2, "--run", "halved")
    trained(2, "--resume", "halved", "--epochs", 3)
    assert losses("whole") == losses("halved")
    model = "model.safetensors"
    assert Path("whole", model).read_bytes() == Path("halved", model).read_bytes()


def wait_for(reached: object, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not reached():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def read(name: str) -> list[object]:
    path = Path(name)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_more_processes_than_rows_are_refused() -> None:
    running = torchrun(3, *SMALL, "--batch-size", 2, "--text", "text.txt", "--run", "run")
    _, errors = running.communicate(timeout=100)
    assert running.returncode != 0
    assert "3 processes need as many rows in a batch" in errors, errors


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 9])
def test_every_row_is_somebodys(count: int, size: int) -> None:
    rows = [r for rank in range(size) for r in range(9)[Processes(rank, size).rows(count)]]
    assert rows == list(range(count))


def test_shares_of_batches_make_them_whole() -> None:
    ids = torch.arange(40).numpy()
    whole = Windows(ids, window=5, batch_size=2, stride=7, seed=1)  # 5 windows
    shares = [Share(whole, Processes(rank, 2).rows).epoch(0) for rank in range(2)]
    for features, labels in whole.epoch(0):
        parts = [next(share) for share in shares]
        counted = [part for part in parts if (part[1] != IGNORED).any()]
        assert len(counted) == len(labels)
        assert torch.equal(torch.cat([part[0] for part in counted]), features)
        assert torch.equal(torch.cat([part[1] for part in counted]), labels)


def test_cut() -> None:
    assert cut(slice(3, 10), 3) == [slice(3, 5), slice(5, 7), slice(7, 10)]
    assert cut(slice(3, 5), 4) == [slice(3, 4), slice(4, 5)]
