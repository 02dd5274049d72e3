"""`python -m benchmarks.gpu` without a GPU: its stages, and what it does when one fails."""

from __future__ import annotations

import json
import math
import operator
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
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
    import benchmarks
    import benchmarks.gpu
    import benchmarks.process
    import benchmarks.stages

    return benchmarks


# -- the command --------------------------------------------------------------------------------


def test_dry_run_leaves_one_document_and_the_table(
    benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process is pytest's
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a second thread only waits at these sizes
    arguments = "--device cpu --installed --stage micro --stage suite --min-time 0 --minutes 5"
    arguments += " --commit 0123456789ab --backend cpu --backend reference --out"
    done = CliRunner().invoke(benchmarks.gpu.main, [*arguments.split(), str(tmp_path)])
    assert done.exit_code == 0, done.output
    files = list(tmp_path.iterdir())
    assert len(files) <= 8 and (tmp_path / "gpu.txt").read_text() == done.stdout
    (result,) = tmp_path.glob("*-gpu-cpu.json")
    document = json.loads(result.read_text())

    assert {key: document[key] for key in ("format", "benchmark", "suite", "device", "commit")} == {
        "format": 1, "benchmark": "gpu", "suite": "smoke", "device": "cpu",
        "commit": "0123456789ab",
    }  # fmt: skip
    assert document["versions"]["torch"] == torch.__version__ and document["versions"]["fused_lstm"]
    assert document["micro"] == {"state": "skipped", "seconds": 0.0, "why": "no GPU"}
    assert list(document["stages"]) == ["micro", "suite"]
    assert document["stages"]["suite"]["state"] == "done"
    assert len(document["rows"]) == 12  # (2 passes and 1) x 2 dtypes x 2 backends
    assert {row["backend"] for row in document["rows"]} == {"cpu", "reference"}
    for row in document["rows"]:
        assert row["suite"] == "smoke" and row["ratio"] > 0 and row["fused_us_per_step"] > 0
        assert f"{row['torch_ms']:.4g}" in done.stdout
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


# -- rows that fail, time that runs out ---------------------------------------------------------


class Script:
    """In place of benchmarks.process.Worker: answers each call as the test says."""

    def __init__(
        self, answer: Callable[[Any], dict[str, Any]], unavailable: dict[str, str]
    ) -> None:
        self.answer, self.missing, self.asked = answer, unavailable, []

    def call(self, function: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
        assert limit_s > 0
        match function.__name__:
            case "measure_here":
                self.asked.append(arguments)
                return self.answer(arguments[0])
            case "unavailable":
                return self.missing
            case "machine":
                return {"processor": "made up", "cores": 1}
            case "versions":
                return {"torch": "0.0"}
        raise AssertionError(function)

    def close(self) -> None:
        pass


TIMES = {"torch_ms": 2.0, "fused_ms": 1.0, "ratio": 2.0, "ratio_quartiles": [1.9, 2.1]}


@pytest.fixture
def start(benchmarks: ModuleType, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes a Run whose worker is a Script."""
    runs = []

    def start(
        answer: Callable[[Any], dict[str, Any]],
        *,
        missing: dict[str, str] | None = None,
        **options: Any,
    ) -> Any:
        asked: dict[str, Any] = {"device": "cpu", "minutes": 1.0, "backends": ("cpu",),
                                 "suite": "smoke", "repeats": 2, "min_time": 0.0}  # fmt: skip
        run = benchmarks.gpu.Run(out=tmp_path, **{**asked, **options})
        run.worker = Script(answer, missing or {})
        run.describe(None)
        runs.append(run)
        return run

    yield start
    for run in runs:
        run.close()


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "made-up-1-cores-gpu-cpu.json").read_text())


def test_a_row_that_fails_is_recorded_and_passed_over(
    benchmarks: ModuleType, start: Callable[..., Any], tmp_path: Path
) -> None:
    def answer(row: Any) -> dict[str, Any]:
        document = json.loads(next(tmp_path.glob("*.json")).read_text())
        assert len(document["rows"]) == len(run.worker.asked) - 1  # written after every row
        if row.dtype == "bf16":
            raise benchmarks.process.Failure("the process ended with status -11")
        return TIMES

    run = start(answer)
    assert not benchmarks.gpu.run_stages(run, ("suite",))
    rows = written(tmp_path)["rows"]
    assert [row.get("error", row.get("ratio")) for row in rows] == [
        2.0, 2.0, *["the process ended with status -11"] * 2, 2.0,
        "the process ended with status -11",
    ]  # fmt: skip
    assert written(tmp_path)["stages"]["suite"]["state"] == "failed"
    assert "the process ended with status -11" in (tmp_path / "gpu.txt").read_text()


def test_what_no_longer_fits_is_named(
    benchmarks: ModuleType, start: Callable[..., Any], tmp_path: Path
) -> None:
    run = start(lambda row: TIMES, min_time=0.5)

    def slow(row: Any) -> dict[str, Any]:
        if len(run.worker.asked) == 2:
            run.start -= 55  # of the minute
        return TIMES

    run.worker.answer = slow
    run.look()
    facts = run.measure("smoke", ("cpu",), run.limit("suite"))
    assert facts["state"] == "done"  # the stage's own limit was set before
    run.start -= 5
    run.measured.clear()
    assert benchmarks.gpu.run_stages(run, ("suite", "tests"))
    document = written(tmp_path)
    assert {name: stage["state"] for name, stage in document["stages"].items()} == {
        "suite": "skipped", "tests": "skipped",
    }  # fmt: skip
    run.start = time.monotonic() - 53.5  # 2.5 s left, and a row wants 1.5 + 1
    benchmarks.gpu.run_stages(run, ("suite",))
    skipped = written(tmp_path)["skipped"]
    assert skipped == {"rows": 6, "first": "small B3 T5 I4 H17 cpu"}
    assert written(tmp_path)["stages"]["suite"]["state"] == "cut"


@pytest.mark.parametrize("backends", [(None,), ("cpu", "triton")])
def test_nn_lstm_alone(
    benchmarks: ModuleType,
    start: Callable[..., Any],
    tmp_path: Path,
    backends: tuple[str | None, ...],
) -> None:
    """Asked for, or because ours did not build; another backend of ours still has its rows."""
    missing = {"cpu": "not built"} if backends[0] else None
    alone = {"torch_ms": 2.0, "pairs": 4, "calls": 1}
    run = start(lambda row: alone if row.backend is None else TIMES,
                backends=backends, missing=missing)  # fmt: skip
    assert benchmarks.gpu.run_stages(run, ("tests", "sanitizer", "suite"))
    document = written(tmp_path)
    assert document["tests"]["why"] == "nn.LSTM is measured alone"
    assert document.get("unavailable") == missing
    assert [row.get("backend") for row in document["rows"]] == [None] * 6 + [*backends[1:] * 6]
    assert all(peers_only == (row.backend is None) for row, *_, peers_only in run.worker.asked)
    assert "small B3 T5 I4 H17 " in (tmp_path / "gpu.txt").read_text()


def test_a_failed_build_leaves_nn_lstm(
    benchmarks: ModuleType,
    start: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An older package that Python may find is not what was asked for."""
    failed = {"state": "failed", "seconds": 1.0, "errors": ["made up"]}
    monkeypatch.setattr(benchmarks.stages, "build", lambda *_: failed)
    run = start(lambda row: {"torch_ms": 2.0, "pairs": 4, "calls": 1})
    assert not benchmarks.gpu.run_stages(run, ("build", "suite"))
    document = written(tmp_path)
    assert document["build"] == failed and document["unavailable"] == {"cpu": "the build failed"}
    assert len(document["rows"]) == 6 and all("fused_ms" not in row for row in document["rows"])


def test_unavailable_backends_are_explained(benchmarks: ModuleType) -> None:
    missing = benchmarks.gpu.unavailable(("cpu", "fast", "reference"))
    assert list(missing) == ["fast"] and "unknown backend 'fast'" in missing["fast"]


def test_rows_of_the_gpu_suite(benchmarks: ModuleType) -> None:
    rows = benchmarks.suites.rows("gpu", ("cuda", "triton"))
    assert len(set(rows)) == len(rows)
    assert [(row.case.hidden_size, row.case.B, row.case.T, row.dtype) for row in rows[:6]] == [
        *[(768, 16, 1024, "bf16")] * 3, *[(768, 16, 1024, "fp16")] * 3,
    ]  # fmt: skip
    assert {row.backend for row in rows} == {"cuda", "triton"}
    assert rows[0].backend == "cuda"
    ours = benchmarks.suites.rows("gpu", ("cuda",))
    assert ours == [row for row in rows if row.backend == "cuda"]
    alone = benchmarks.suites.rows("gpu", (None,))
    assert [(r.case, r.dtype, r.pass_) for r in alone] == [(r.case, r.dtype, r.pass_) for r in ours]
    for row in rows:  # each has a name that finds it
        assert row.case in benchmarks.suites.SUITES[row.suite].cases


def test_published_figures_stand_beside_their_case_only(benchmarks: ModuleType) -> None:
    of = benchmarks.published.of
    row = {"B": 16, "T": 1024, "I": 768, "H": 768, "pass": "forward", "torch_ms": 2.0,
           "fused_ms": 1.5}  # fmt: skip
    assert of(row)["FlashRNN bf16 H100 SXM"] == {"ms": 4.87, "over_fused": 3.247,
                                                 "over_torch": 2.435}  # fmt: skip
    assert of({**row, "pass": "forward+backward"})["nn.LSTM fp16 H100 SXM"]["ms"] == 5.19
    for other in ({"B": 8}, {"I": 64}, {"shortest": 3}, {"pass": "forward, graph"}):
        assert of({**row, **other}) == {}


# -- processes ----------------------------------------------------------------------------------


def test_worker_outlives_what_it_calls(benchmarks: ModuleType, tmp_path: Path) -> None:
    worker = benchmarks.process.Worker(tmp_path / "worker.log")
    failure = benchmarks.process.Failure
    try:
        assert worker.call(operator.add, 1, 2, limit_s=60) == 3
        first = worker.call(os.getpid, limit_s=60)
        with pytest.raises(failure, match="ValueError: .*domain|ValueError: expected"):
            worker.call(math.sqrt, -1, limit_s=60)
        assert worker.call(os.getpid, limit_s=60) == first
        with pytest.raises(failure, match="ended with status 3"):
            worker.call(os._exit, 3, limit_s=60)
        with pytest.raises(failure, match="no answer in 1 s"):
            worker.call(time.sleep, 600, limit_s=1)
        assert worker.call(os.getpid, limit_s=60) != first
        worker.call(os.write, 1, b"printed\n", limit_s=60)
    finally:
        worker.close()
    assert "printed" in (tmp_path / "worker.log").read_text()


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


# -- stages -------------------------------------------------------------------------------------

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
    monkeypatch.setattr(benchmarks.report, "ROOT", checkout)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("MAX_JOBS", "2" if good else "0")
    monkeypatch.setenv("PYTHONPATH", "before")
    facts = benchmarks.stages.build("9.0", tmp_path / "build.log", 120, package)
    assert (tmp_path / "build.log").read_text()
    if not good:
        assert facts["state"] == "failed" and any("no jobs" in line for line in facts["errors"])
        assert str(tmp_path) not in json.dumps(facts)
        return
    assert facts["state"] == "done" and facts["from_scratch"] and facts["within_limit"]
    assert facts["TORCH_CUDA_ARCH_LIST"] == "9.0a" and facts["FUSED_LSTM_CUDA"] == "1"
    assert os.environ["PYTHONPATH"] == f"{package}{os.pathsep}before"
    import fused_lstm_trial

    assert fused_lstm_trial.ARCH == "9.0a"


def test_tests_stage(benchmarks: ModuleType, tmp_path: Path) -> None:
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
    states = [text.split()[0] for text in facts["selections"].values()]
    assert states == ["failed", "done", "skipped"]
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
    assert facts["selections"]["late"].startswith("skipped")


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
        (0, ["odd, fp32, forward: right", MEMCHECK.format(0)], "done"),
        (86, ["========= Invalid __global__ write", MEMCHECK.format(2)], "failed"),
        (1, ["odd, fp32, forward: wrong: output", MEMCHECK.format(0)], "failed"),
        (1, ["========= Error: Device not supported."], "skipped"),
        (0, ["nothing was checked"], "failed"),
        (None, ["odd, fp32, forward: right"], "cut"),
    ],
)
def test_sanitizer_verdict(
    benchmarks: ModuleType, code: int | None, lines: list[str], state: str
) -> None:
    facts = benchmarks.stages.checked(benchmarks.process.Done(code, 1.0, lines))
    assert facts["state"] == state
    assert facts["right"] == sum("right" in line for line in lines)
    if state == "failed" and code:
        assert facts["errors"]


def test_small_run_is_right_and_sees_what_is_wrong(
    benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import benchmarks.small_run as small_run

    cpu = torch.device("cpu")
    case = small_run.CASES[2]
    for pass_ in case.passes:
        assert small_run.wrong(case, "bf16", pass_, cpu) == []

    class Wrong(torch.nn.LSTM):
        def forward(self, *args):  # type: ignore[no-untyped-def]
            output, states = super().forward(*args)
            return output * 1.2, states

    monkeypatch.setattr("fused_lstm.FusedLSTM", Wrong)
    assert small_run.wrong(small_run.CASES[0], "fp32", "forward", cpu) == ["output"]


def test_micro_compiles(benchmarks: ModuleType, tmp_path: Path) -> None:
    if benchmarks.stages.nvcc() is None:
        pytest.skip("nvcc was not found")
    binary = tmp_path / "micro"
    both = ("-gencode", "arch=compute_80,code=sm_80", "--threads", "2")  # the oldest too
    facts = benchmarks.stages.compile_micro(binary, "9.0a", tmp_path / "log", 240, *both)
    assert facts["state"] == "done" and binary.exists(), facts
    assert "warning" not in (tmp_path / "log").read_text()
    if torch.cuda.is_available():
        return
    found = benchmarks.stages.micro(binary, tmp_path / "log", 60)
    assert found["state"] == "failed" and "error" in found["measured"]["device"]


def test_micro_output(benchmarks: ModuleType) -> None:
    lines = ['{"name": "grid.sync", "value": 1.1, "unit": "us"}', "not JSON", "[1]", "{}",
             '{"name": "flag hop", "error": "a wait was given up"}']  # fmt: skip
    assert benchmarks.stages.measurements(lines) == {
        "grid.sync": {"value": 1.1, "unit": "us"},
        "flag hop": {"error": "a wait was given up"},
    }
