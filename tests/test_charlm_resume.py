"""charlm train --resume and --init: the bits of a run never interrupted, and what is refused."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import charlm.commands.train
import pytest
import torch
from charlm.cli import main
from charlm.corpus import builtin_text
from charlm.files import Lock
from charlm.runfolder import RunFolder
from charlm.training import Trainer
from click.testing import CliRunner, Result

SMALL = ["--hidden", "17", "--window", "17", "--batch-size", "9", "--embedding", "5",
         "--length", "40"]  # fmt: skip
FILES = ("model.safetensors", "sample.txt")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own with a text, on one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHARLM_DATA", raising=False)
    Path("text.txt").write_text(builtin_text()[:12_000], encoding="utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def charlm_train(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, ["train", *map(str, arguments)], input=stdin)


def train(*arguments: object) -> str:
    result = charlm_train(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object, stdin: bytes | None = None) -> str:
    result = charlm_train(*arguments, stdin=stdin)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert result.output.startswith("Error: ") or "\nError: " in result.output
    return " ".join(result.output.split())


def outcome(run: str) -> tuple[object, ...]:
    lines = Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [{**json.loads(line), "seconds": 0} for line in lines]
    return [*records], *(Path(run, name).read_bytes() for name in FILES)


def interrupt_at(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The k-th session of charlm train gets its Ctrl-C right after step steps[k]."""

    class Interrupted(charlm.commands.train.Interrupt):
        def __enter__(self) -> Interrupted:
            self.at = steps.pop(0) if steps else None
            current.append(self)
            return self

        def __exit__(self, *error: object) -> None:
            pass

    current: list[Interrupted] = []
    step = Trainer._step

    def counted(self: Trainer, *batch: torch.Tensor) -> torch.Tensor:
        loss = step(self, *batch)
        if self.step == current[-1].at:
            current[-1].asked = True
        return loss

    monkeypatch.setattr(charlm.commands.train, "Interrupt", Interrupted)
    monkeypatch.setattr(Trainer, "_step", counted)


CASES = {
    "rows": ["--steps", 80, "--eval-every", 30, "--dropout", 0.3, "--layers", 2],
    "windows": ["--batches", "windows", "--stride", 17, "--epochs", 2, "--dropout", 0.2],
    "plateau": ["--epochs", 2, "--schedule", "plateau", "--patience", 1, "--decay", 0.5,
                "--lr", 0.3, "--validation", 0.1, "--clip", 1],
    "sgd": ["--epochs", 2, "--optimizer", "sgd", "--lr", 1, "--schedule", "decay"],
    "live": ["--epochs", 2, "--log", "live", "--samples", "first-batch", "--cell", "rnn"],
    "gpt-simple": ["--steps", 40, "--log", "gpt-simple", "--eval-every", 5, "--eval-from", 1,
                   "--eval-batches", 2, "--eval-train", "--samples", "epoch", "--test", 0.1],
    "stop": ["--epochs", 9, "--stop", "below", "--stop-below", 3.2, "--optimizer", "adam"],
    "gru": ["--steps", 40, "--cell", "gru", "--vocabulary", "bytes"],
    "one-bias": ["--steps", 40, "--cell", "rnn", "--biases", 1, "--initial", "xavier"],
    "bfloat16": ["--steps", 40, "--dtype", "bfloat16", "--layers", 2],
    "lstm": ["--steps", 40, "--cell", "lstm", "--schedule", "cosine", "--warmup", 0.1],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_interrupted_runs_end_with_the_same_bits(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--text", "text.txt", *SMALL, *CASES[case]]
    whole = train("--run", "whole", *arguments)
    interrupt_at([1, 13, 30, 39], monkeypatch)
    assert charlm_train("--run", "parts", *arguments).exit_code == 130
    for _ in range(3):
        assert charlm_train("--resume", "parts").exit_code == 130
    rest = train("--resume", "parts")
    assert "goes on at step 39 of" in rest
    assert outcome("parts") == outcome("whole")
    assert whole.splitlines()[-4:-1] == rest.splitlines()[-4:-1]  # the sample
    # A finished run that is resumed is what it was.
    train("--resume", "parts")
    assert outcome("parts") == outcome("whole")


def test_the_lowest_perplexity_so_far_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--text", "text.txt", *SMALL, *CASES["live"]]
    whole = train("--run", "whole", *arguments)
    interrupt_at([100], monkeypatch)
    charlm_train("--run", "parts", *arguments)
    assert "Min Loss" in whole and whole.splitlines()[-6] == train(
        "--resume", "parts"
    ).splitlines()[-6]  # fmt: skip


@pytest.mark.parametrize("length", ["--epochs", "--steps"])
def test_a_finished_run_takes_more(length: str) -> None:
    per_epoch = 12_000 // 9 // 17
    first, more = (1, 2) if length == "--epochs" else (50, per_epoch + 9)
    arguments = ["--text", "text.txt", *SMALL, "--preset", "rnn-basics", "--eval-every", 20]
    train("--run", "whole", *arguments, length, more)
    train("--run", "parts", *arguments, length, first)
    assert len(outcome("parts")[0]) == -(-(first if length == "--steps" else 70) // 20)
    train("--resume", "parts", length, more)
    assert outcome("parts") == outcome("whole")


def test_what_would_have_changed_a_step_is_refused() -> None:
    train("--run", "r", "--text", "text.txt", "--steps", 30, *SMALL)
    before = {path.name: path.read_bytes() for path in Path("r").iterdir()}
    Path("other.txt").write_text("Another text. " * 900)
    for arguments, message in (
        (["--hidden", 18], "--hidden 18 isn't the run's, which is 17"),
        (["--lr", 1], "--lr 1.0 isn't the run's"),
        (["--vocabulary", "bytes"], "--vocabulary bytes isn't the run's, which is characters"),
        (["--text", "other.txt"], "other.txt isn't the text that r was trained on"),
        (["--preset", "default"], "leave --preset out"),
        (["--run", "s"], "leave --run out"),
        (["--steps", 60], "laid out for its length (schedule cosine"),
        (["--epochs", 9], "laid out for its length (schedule cosine"),
    ):
        assert message in refused("--resume", "r", *arguments)
    Path("text.txt").rename("moved.txt")
    assert "which isn't there: pass it with --text" in refused("--resume", "r")
    assert {path.name: path.read_bytes() for path in Path("r").iterdir()} == before
    train("--resume", "r", "--text", "moved.txt", "--hidden", 17)
    assert "has no config.json" in refused("--resume", "absent")
    train("--run", "long", "--preset", "rnn-basics", "--text", "moved.txt", "--steps", 30, *SMALL)
    assert "has made 30 steps already" in refused("--resume", "long", "--steps", 20)


def test_standard_input_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path("text.txt").read_bytes()
    arguments = ["--run", "r", "--text", "-", "--steps", 30, *SMALL]
    assert charlm_train(*arguments, stdin=data).exit_code == 0
    assert "text was standard input" in refused("--resume", "r")
    assert charlm_train("--resume", "r", "--text", "-", stdin=data).exit_code == 0
    assert "isn't the text" in refused("--resume", "r", "--text", "-", stdin=data[1:])


def test_init_begins_from_old_weights() -> None:
    train("--run", "old", "--text", "text.txt", "--steps", 60, "--cell", "lstm", *SMALL)
    weights = Path("old/model.safetensors").read_bytes()
    train("--run", "new", "--init", "old", "--text", "text.txt", "--cell", "fused", "--steps", 1,
          "--lr", 1e-30, "--schedule", "constant")  # fmt: skip
    old, new = (RunFolder(Path(name)).read_model() for name in ("old", "new"))
    assert new[1] == old[1] and new[0].hyperparameters["cell"] == "fused"
    for name, value in old[0].state_dict().items():
        assert torch.equal(new[0].state_dict()[name], value)
    assert "--hidden 18 doesn't fit the weights of old, whose hidden is 17" in refused(
        "--init", "old", "--hidden", 18
    )
    assert "--cell gru doesn't fit" in refused("--init", "old", "--cell", "gru")
    Path("other.txt").write_text("The text " * 900 + "\u2603")
    message = refused("--init", "old", "--text", "other.txt", "--run", "s")
    assert "other.txt has the character '\u2603' at position 8,100, which" in message
    assert Path("old/model.safetensors").read_bytes() == weights and not Path("s").exists()


def test_a_second_writer_is_kept_out() -> None:
    train("--run", "r", "--text", "text.txt", "--steps", 3, *SMALL)
    with Lock(Path("r")):
        assert "another process is writing to r" in refused("--resume", "r")
    train("--resume", "r")


def test_device_and_threads_may_change_with_a_note() -> None:
    train("--run", "r", "--text", "text.txt", "--steps", 3, *SMALL)
    output = train("--resume", "r", "--device", "auto", "--threads", 2)
    assert "device was cpu and is auto" in output and "threads was 1 and is 2" in output


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"\xff" * 8, None])
def test_a_checkpoint_that_is_none(data: bytes | None) -> None:
    train("--run", "r", "--text", "text.txt", "--steps", 3, *SMALL)
    path = Path("r/checkpoint.safetensors")
    path.write_bytes(path.read_bytes()[:-9] if data is None else data)
    assert "checkpoint.safetensors isn't a checkpoint of this run" in refused("--resume", "r")


def test_a_full_disk_ends_the_run_and_keeps_the_checkpoint(folder: Path) -> None:
    """The limit on a file's size stands in for the disk's: the write fails in the same place."""
    train("--run", "r", "--preset", "rnn-basics", "--text", "text.txt", "--steps", 30, *SMALL)
    before = Path("r/checkpoint.safetensors").read_bytes()
    process = subprocess.run(
        [sys.executable, "-m", "charlm", "train", "--resume", "r", "--steps", "60"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(charlm.__file__).parent.parent)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000)),
    )
    assert process.returncode == 1 and "Traceback" not in process.stderr, process.stderr
    assert "Error: cannot write r/" in process.stderr and "File too large" in process.stderr
    assert Path("r/checkpoint.safetensors").read_bytes() == before
    train("--resume", "r", "--steps", 60)
    train("--run", "s", "--preset", "rnn-basics", "--text", "text.txt", "--steps", 60, *SMALL)
    assert outcome("r") == outcome("s")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_end_with_the_same_bits(kills: int, seed: int, folder: Path) -> None:
    script = Path(__file__).with_name("killed_runs.py")
    process = subprocess.run(
        [sys.executable, str(script), str(folder), str(kills), str(seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(charlm.__file__).parent.parent)},
    )
    errors = folder / "errors.txt"
    said = process.stdout + process.stderr + (errors.read_text() if errors.exists() else "")
    print(said)
    assert process.returncode == 0 and process.stdout.count(": same\n") == kills + 11, said
