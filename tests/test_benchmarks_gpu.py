"""`python -m benchmarks.gpu` without a GPU: its stages, and what it does when one fails."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner

PYTHON = Path(__file__).resolve().parent.parent / "python"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The package, which is run from its folder and not installed, with the modules used here."""
    monkeypatch.syspath_prepend(str(PYTHON))
    import benchmarks.gpu
    import benchmarks.lstm

    return benchmarks


# -- the command --

DRY = ["--device", "cpu", "--suite", "smoke", "--min-time", "0", "--minutes", "5"]


def test_dry_run_leaves_one_document_and_prints_its_rows(
    benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is pytest's
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a second thread only waits at these sizes
    arguments = "--installed --stage micro --stage suite --commit 0123456789ab --backend cpu"
    arguments += " --backend reference --backend fast --out"
    done = CliRunner().invoke(benchmarks.gpu.main, [*DRY, *arguments.split(), str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert len(list(tmp_path.iterdir())) <= 8
    (result,) = tmp_path.glob("*-gpu-cpu.json")
    document = json.loads(result.read_text())

    assert {key: document[key] for key in ("format", "benchmark", "suite", "device", "commit")} == {
        "format": 1, "benchmark": "gpu", "suite": "smoke", "device": "cpu",
        "commit": "0123456789ab",
    }  # fmt: skip
    assert document["versions"]["torch"] == torch.__version__ and document["versions"]["fused_lstm"]
    assert document["unavailable"] == {"fast": "unknown backend 'fast'"}
    assert document["micro"] == {"state": "skipped", "seconds": 0.0, "why": "no GPU"}
    assert list(document["stages"]) == ["micro", "suite"]
    assert document["stages"]["suite"]["state"] == "done"
    assert len(document["rows"]) == 12  # (2 passes and 1) x 2 dtypes x 2 backends
    assert {row["backend"] for row in document["rows"]} == {"cpu", "reference"}
    for row in document["rows"]:
        assert row["ratio"] > 0 and row["fused_us_per_step"] > 0
        assert f"torch_ms {row['torch_ms']} " in done.stdout
    for path in (PYTHON.parent, Path(sys.prefix), Path.home(), tmp_path):
        assert str(path) not in result.read_text()


def test_without_a_gpu_one_sentence_says_so(
    benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(benchmarks.gpu.main, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "sees no NVIDIA GPU" in result.output and "\n" not in result.output.strip()
    assert not (tmp_path / "out").exists()


# -- rows that fail, time that runs out --


class Script:
    """In place of benchmarks.process.run: each call writes the rows that the test has for it."""

    def __init__(self, done: type, *calls: tuple[int | None, list[dict[str, Any]]]) -> None:
        self.done, self.calls, self.asked = done, list(calls), []

    def __call__(self, command: list[str], log: Path, limit_s: float, **_: Any) -> Any:
        self.asked.append({of.split("=")[0]: of.split("=")[-1] for of in command[3:]})
        path = Path(self.asked[-1]["--out"])
        document = json.loads(path.read_text())
        code, rows = self.calls.pop(0)
        document["rows"] += rows
        if code == 0 and not rows:
            document["skipped"] = {"rows": 1, "first": "made up"}
        path.write_text(json.dumps(document))
        return self.done(code, 1.0, [])


@pytest.fixture
def start(
    benchmarks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Makes a Run whose rows are a Script's."""

    def start(*calls: tuple[int | None, list[dict[str, Any]]], **options: Any) -> Any:
        script = Script(benchmarks.process.Done, *calls)
        monkeypatch.setattr(benchmarks.gpu, "run", script)
        asked = {"minutes": 1.0, "backends": ("cpu",), "suite": "smoke", "repeats": 2}
        run = benchmarks.gpu.Run(tmp_path, device="cpu", **asked | {"min_time": 0.0} | options)
        run.script = script
        return run

    return start


GOOD = {"case": "a", "B": 1, "T": 1, "I": 1, "H": 1, "dtype": "fp32", "pass": "forward"}
BAD = {**GOOD, "error": "made up"}


@pytest.mark.parametrize(
    ("calls", "state"),
    [
        ([(0, [GOOD, GOOD])], "done"),
        ([(1, [GOOD, BAD]), (-11, [BAD]), (0, [GOOD])], "failed"),  # and went on behind each
        ([(1, [])], "failed"),  # not a row: it does not even start
        ([(0, [])], "cut"),
    ],
)
def test_rows_go_on_in_a_new_process(
    benchmarks: ModuleType, start: Callable[..., Any], calls: Any, state: str
) -> None:
    run = start(*calls)
    assert benchmarks.gpu.run_stages(run, ["suite"]) == (state in ("done", "cut"))
    document = json.loads(run.report.path.read_text())
    assert document["stages"]["suite"]["state"] == state
    assert len(run.script.asked) == len(calls)
    assert len(document["rows"]) == sum(len(rows) for _, rows in calls)
    assert all(asked["--backend"] == "cpu" for asked in run.script.asked)


def test_no_stage_is_begun_without_time(benchmarks: ModuleType, start: Callable[..., Any]) -> None:
    run = start(minutes=0.1)  # less than is kept in reserve
    assert benchmarks.gpu.run_stages(run, ["suite", "tests"])
    stages = run.report.document["stages"]
    assert [stages[name]["state"] for name in ("suite", "tests")] == ["skipped"] * 2


def test_nothing_is_measured_after_a_failed_build(
    benchmarks: ModuleType, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older package that Python may find is not what was asked for."""
    failed = {"state": "failed", "seconds": 1.0, "errors": ["made up"]}
    monkeypatch.setattr(benchmarks.gpu.Run, "found", lambda *_: failed)
    run = start()
    assert not benchmarks.gpu.run_stages(run, ["build", "suite"], "0123456789ab")
    document = json.loads(run.report.path.read_text())
    assert document["build"] == failed and list(document["stages"]) == ["build"]
    assert document["commit"] == "0123456789ab" and document["rows"] == []


def test_without_a_backend_nothing_is_measured(
    benchmarks: ModuleType, start: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert not benchmarks.gpu.run_stages(start(backends=("fast",)), ["suite"])
    assert "not measured: fast: unknown backend 'fast'" in capsys.readouterr().out


def test_rows_of_the_gpu_suite(benchmarks: ModuleType) -> None:
    rows = benchmarks.suites.rows("gpu", ("cuda", "triton"))
    assert len(set(rows)) == len(rows)
    assert [(row.case.hidden_size, row.case.B, row.case.T, row.dtype) for row in rows[:4]] == [
        *[(768, 16, 1024, "bf16")] * 2, *[(768, 16, 1024, "fp16")] * 2,
    ]  # fmt: skip
    assert {row.backend for row in rows} == {"cuda", "triton"}
    assert rows[0].backend == "cuda"
    ours = benchmarks.suites.rows("gpu", ("cuda",))
    assert ours == [row for row in rows if row.backend == "cuda"]
    for row in rows:  # each has a name that finds it
        assert row.case in benchmarks.suites.SUITES[row.suite].cases


# -- processes --


def named_or_lost(side: str, row: Any) -> str:
    """What a side's process does in the test below."""
    if row == "raises":
        raise ValueError(f"made up\nat {PYTHON}")
    if row == "dies":
        os._exit(3)
    if row == "hangs":
        time.sleep(600)
    return f"{side} {os.getpid()}"


@pytest.mark.parametrize(
    ("row", "error"),
    [("raises", "torch: ValueError: made up"), ("hangs", "torch: over 5 s"),
     ("dies", "torch: the process ended with status 3")],
)  # fmt: skip
def test_a_side_that_fails_is_recorded(benchmarks: ModuleType, row: str, error: str) -> None:
    limit_s = 5 if row == "hangs" else 60
    facts = benchmarks.process.each_side(named_or_lost, row, unit="ms", limit_s=limit_s)
    assert list(facts) == ["error"] and facts["error"].startswith(error)
    assert str(PYTHON) not in facts["error"]


def test_each_side_has_a_process_of_its_own(benchmarks: ModuleType) -> None:
    facts = benchmarks.process.each_side(named_or_lost, "is well", unit="ms", limit_s=60)
    (torch_, a), (fused, b) = facts["torch_ms"].split(), facts["fused_ms"].split()
    assert (torch_, fused) == ("torch", "fused")
    assert len({a, b, str(os.getpid())}) == 3


def test_program_at_its_limit_ends_with_all_it_started(
    benchmarks: ModuleType, tmp_path: Path
) -> None:
    script = f"echo started; sleep 600 & echo $! > {tmp_path}/pid; wait"
    done = benchmarks.process.run(["sh", "-c", script], tmp_path / "log", limit_s=1)
    assert (done.state, done.code, done.lines) == ("cut", None, ["started"])
    assert done.seconds < 30
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):  # until whoever inherited it has taken note
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the program had started is still there")
    assert (tmp_path / "log").read_text() == "started\n"


# -- stages --

SETUP = """
import os
from setuptools import setup
os.makedirs("fused_lstm_trial", exist_ok=True)
with open("fused_lstm_trial/__init__.py", "w") as file:
    file.write("ARCH = " + repr(os.environ.get("TORCH_CUDA_ARCH_LIST")))
if os.environ.get("MAX_JOBS") == "0":
    raise SystemExit("error: no jobs")
setup(name="fused_lstm_trial", version="1", packages=["fused_lstm_trial"])
"""


@pytest.mark.parametrize("good", [True, False])
def test_build(
    benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, good: bool
) -> None:
    """A small package in place of the checkout."""
    pytest.importorskip("setuptools")
    pytest.importorskip("pip")
    checkout, package = tmp_path / "checkout", tmp_path / "package"
    checkout.mkdir()
    (checkout / "setup.py").write_text(SETUP)
    monkeypatch.setattr(benchmarks.stages, "ROOT", checkout)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("MAX_JOBS", "2" if good else "0")
    monkeypatch.setenv("PYTHONPATH", "before")
    facts = benchmarks.stages.build("9.0a", tmp_path / "build.log", 120, package)
    assert (tmp_path / "build.log").read_text()
    if not good:
        assert facts["state"] == "failed" and any("no jobs" in line for line in facts["errors"])
        assert str(tmp_path) not in json.dumps(facts)
        return
    assert facts["state"] == "done"
    assert facts["TORCH_CUDA_ARCH_LIST"] == "9.0a" and facts["FUSED_LSTM_CUDA"] == "1"
    assert os.environ["PYTHONPATH"] == f"{package}{os.pathsep}before"
    import fused_lstm_trial

    assert fused_lstm_trial.ARCH == "9.0a"


def test_tests_stage(
    benchmarks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-qq")  # the user's, with whom no test has a line
    (tmp_path / "test_trial.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', ['FAILED', 2, 3])\n"
        "def test_it(n): assert n != 2\n"
        "def test_other(): pytest.skip('no')\n"
    )
    log = tmp_path / "tests.log"
    select = ("--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path / "test_trial.py"))
    select = (*select, "-p", "no:hypothesispytest")
    selections = {"both": select, "one": (*select, "-k", "other"), "none": (*select, "-k", "no_")}
    facts = benchmarks.stages.tests(log, 60, selections)
    assert facts["state"] == "failed"
    assert facts["outcomes"] == {"passed": 2, "failed": 1, "skipped": 2}
    assert list(facts["selections"].values()) == ["failed", "done", "skipped"]
    (failure,) = facts["failures"]
    assert "test_it[2]" in failure


def test_a_cut_tests_stage_names_its_failures(benchmarks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_trial.py").write_text(
        "import time\n"
        "def test_bad(): assert False\n"
        "def test_slow(): time.sleep(600)\n"
        "def test_never(): pass\n"
    )
    select = ("--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path / "test_trial.py"))
    selections = {"slow": (*select, "-p", "no:hypothesispytest"), "late": select}
    facts = benchmarks.stages.tests(tmp_path / "tests.log", 12, selections)
    assert facts["state"] == "failed"
    assert "test_bad" in facts["failures"][0]
    assert facts["selections"] == {"slow": "cut", "late": "cut"}


def test_a_lost_gpu_does_not_take_the_other_tests_along(
    benchmarks: ModuleType, tmp_path: Path
) -> None:
    """The process ends, as tests/conftest.py lets it, and another goes on behind the test."""
    conftest = Path(__file__).with_name("conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(
        conftest + "\n\ndef lost():\n    raise RuntimeError('made up')\n\n"
        "torch.cuda.is_initialized = lambda: True\ntorch.cuda.synchronize = lost\n"
    )
    (tmp_path / "test_trial.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_it(n): assert n != 1\n"
    )
    select = ("--rootdir", str(tmp_path), "-c", os.devnull, str(tmp_path / "test_trial.py"),
              "-p", "no:hypothesispytest", "-p", "no:xdist")  # fmt: skip
    facts = benchmarks.stages.tests(tmp_path / "tests.log", 100, {"all": select})
    assert facts["outcomes"] == {"passed": 3, "failed": 1}, facts
    assert facts["state"] == "failed"


MEMCHECK = "========= ERROR SUMMARY: {} errors"


@pytest.mark.parametrize(
    ("code", "lines", "state"),
    [
        (0, ["odd fp32 forward distance 0", MEMCHECK.format(0)], "done"),
        (86, ["========= Invalid __global__ write", MEMCHECK.format(2)], "failed"),
        (1, ["Error: WrongResult: odd, fp32: wrong: output", MEMCHECK.format(0)], "failed"),
        (1, ["========= Error: Device not supported."], "skipped"),
        (0, ["nothing was checked"], "failed"),
        (None, ["odd fp32 forward distance 0"], "cut"),
    ],
)
def test_sanitizer_verdict(
    benchmarks: ModuleType, code: int | None, lines: list[str], state: str
) -> None:
    facts = benchmarks.stages.checked(benchmarks.process.Done(code, 1.0, lines))
    assert facts["state"] == state
    assert facts["right"] == sum("distance" in line for line in lines)
    if state == "failed" and code:
        assert facts["errors"]


def test_small_runs_are_right_and_see_what_is_wrong(
    benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, rows = benchmarks.measure, benchmarks.suites.rows("odd", dtypes=("bf16",))
    for row in rows[-2:]:  # all options, both passes
        assert measure.checked(row, "cpu")["distance"] < measure.BROKEN

    class Wrong(torch.nn.LSTM):
        def forward(self, *args):  # type: ignore[no-untyped-def]
            output, states = super().forward(*args)
            return output * 1.2, states

    monkeypatch.setattr(measure, "FusedLSTM", Wrong)
    with pytest.raises(measure.WrongResult, match="odd, bf16: wrong: output"):
        measure.checked(rows[0], "cpu")


def test_micro_compiles(benchmarks: ModuleType, tmp_path: Path) -> None:
    if benchmarks.stages.program("nvcc") is None:
        pytest.skip("nvcc was not found")
    both = ("-gencode", "arch=compute_80,code=sm_80", "--threads", "2")  # the oldest too
    facts = benchmarks.stages.micro("9.0a", tmp_path / "log", 240, *both)
    assert "errors" not in facts and "warning" not in (tmp_path / "log").read_text(), facts
    if not torch.cuda.is_available():
        assert facts["state"] == "failed" and "error" in facts["measured"]["device"]


def test_micro_output(benchmarks: ModuleType) -> None:
    lines = ['{"name": "flag hop", "value": 0.59, "unit": "us"}', "not JSON",
             '{"name": "data hop", "error": "a wait was given up"}']  # fmt: skip
    assert benchmarks.stages.measurements(lines) == {
        "flag hop": {"value": 0.59, "unit": "us"},
        "data hop": {"error": "a wait was given up"},
    }
