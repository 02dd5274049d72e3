"""The benchmarks run, refuse to time wrong results, and report in the one format."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from torch import nn

PYTHON = Path(__file__).resolve().parent.parent / "python"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The package, which is run from its folder and not installed, with all its modules."""
    monkeypatch.syspath_prepend(str(PYTHON))
    import benchmarks
    import benchmarks.lstm

    # At sizes this small a second thread only waits, and on a busy machine it waits long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield benchmarks
    torch.set_num_threads(threads)


def test_command_prints_a_table_and_writes_the_same(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = "--suite seeds --device cpu --case one-step-96 --repeats 2 --min-time 0 --threads 1"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.lstm", *arguments.split(), "--out", str(out)],
        check=False, cwd=PYTHON, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())

    assert {key: report[key] for key in ("format", "benchmark", "suite", "device", "threads")} == {
        "format": 1, "benchmark": "lstm", "suite": "seeds", "device": "cpu", "threads": 1,
    }  # fmt: skip
    assert report["machine"]["processor"] and report["machine"]["cores"] >= 1
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["backends"]
    assert [row["dtype"] for row in report["rows"]] == ["fp32", "bf16"]
    for row in report["rows"]:
        assert [row[key] for key in ("case", "B", "T", "I", "H")] == ["one-step-96", 1, 1, 48, 96]
        assert row["pass"] == "forward"
        assert row["fused_us_per_step"] == pytest.approx(row["fused_ms"] * 1e3, rel=1e-3)
        assert row["torch_ms"] > 0 and row["fused_ms"] > 0 and row["calls"] >= 1
        assert row["pairs"] >= 2 and row["pairs"] % 2 == 0
        first, third = row["ratio_quartiles"]
        assert 0 < first <= row["ratio"] <= third

    table = [line for line in done.stdout.splitlines() if line.startswith("one-step-96 B1 T1 I48")]
    assert len(table) == 2
    assert f"torch_ms {report['rows'][0]['torch_ms']} " in table[0]
    for fact in (report["machine"]["processor"], torch.__version__, "threads: 1"):
        assert fact in done.stdout

    # What is kept in git names the machine by its processor and holds no path of it.
    for path in (PYTHON.parent, Path(sys.prefix), Path.home(), tmp_path):
        assert str(path) not in out.read_text()


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
def test_forward_and_backward_with_every_option(benchmarks: ModuleType, dtype: str) -> None:
    case = benchmarks.suites.Case(
        "all options", 3, 9, 5, 17, num_layers=2, bidirectional=True, proj_size=7
    )
    for pass_ in case.passes:
        row = benchmarks.suites.Row("tried here", case, dtype, pass_)
        facts = row.facts() | benchmarks.measure.measured(row, "cpu", 2, 0)
        assert (facts["num_layers"], facts["bidirectional"], facts["proj_size"]) == (2, True, 7)
        assert (facts["dtype"], facts["pass"]) == (dtype, pass_)
        assert "num_layers=2 bidirectional=True proj_size=7" in benchmarks.report.line(facts)


class SwappedGates(nn.LSTM):
    """Takes the forget gate for the input gate."""

    def forward(self, *args):  # type: ignore[no-untyped-def]
        weights = {}
        for name, weight in self.named_parameters():
            i, f, g, o = weight.chunk(4)
            weights[name] = torch.cat([f, i, g, o])
        lstm = nn.LSTM(self.input_size, self.hidden_size, dtype=self.weight_hh_l0.dtype)
        return torch.func.functional_call(lstm, weights, args)


class WrongGradient(nn.LSTM):
    """Right outputs; the gradients of bias_hh are a fifth too large."""

    def forward(self, *args):  # type: ignore[no-untyped-def]
        weights = dict(self.named_parameters())
        bias = weights["bias_hh_l0"]
        weights["bias_hh_l0"] = bias + (bias - bias.detach()) / 5
        lstm = nn.LSTM(self.input_size, self.hidden_size, dtype=bias.dtype)
        return torch.func.functional_call(lstm, weights, args)


class NotANumber(nn.LSTM):
    def forward(self, *args):  # type: ignore[no-untyped-def]
        output, states = super().forward(*args)
        return output * torch.nan, states


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (SwappedGates, "output"),
        (WrongGradient, "the gradient of bias_hh_l0"),
        (NotANumber, "output"),
    ],
)
def test_a_wrong_result_is_not_timed(
    benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch, wrong: type[nn.LSTM], named: str
) -> None:
    monkeypatch.setattr(benchmarks.measure, "FusedLSTM", wrong)
    case = benchmarks.suites.Case("small", B=3, T=9, input_size=5, hidden_size=17)
    row = benchmarks.suites.Row("tried here", case, "bf16", "forward+backward")
    with pytest.raises(benchmarks.measure.WrongResult, match=f"small, bf16: {named} is wrong"):
        benchmarks.measure.measured(row, "cpu", 2, 0)


def test_a_wrong_result_ends_the_command_in_words(
    benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And is in the document as an error; what comes after it is measured when resumed."""
    out = tmp_path / "out.json"
    arguments = ["--suite", "smoke", "--repeats", "2", "--min-time", "0", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(benchmarks.measure, "FusedLSTM", NotANumber)
        result = CliRunner().invoke(benchmarks.lstm.main, arguments)
    assert result.exit_code == 1
    assert "Error: WrongResult: small, fp32: output is wrong" in result.output
    (row,) = json.loads(out.read_text())["rows"]
    assert "output is wrong" in row["error"] and "ratio" not in row
    result = CliRunner().invoke(benchmarks.lstm.main, [*arguments, "--resume"])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert rows[0] == row and len(rows) == 6 and all("ratio" in row for row in rows[1:])


def test_a_row_that_takes_its_process_along_is_recorded(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    asked = ["--suite=smoke", "--repeats=2", "--min-time=0", f"--out={out}", "--resume"]
    killed = f"""
import os
from benchmarks import lstm
lstm.HOW["time"] = lambda *_, **__: os._exit(3)
lstm.main({asked})"""
    for command, code, rows in (("-c", 3, 1), ("-c", 3, 2), ("-m", 0, 6)):
        what = [killed] if command == "-c" else ["benchmarks.lstm", *asked]
        done = subprocess.run([sys.executable, command, *what], cwd=PYTHON, timeout=120)
        assert done.returncode == code
        found = json.loads(out.read_text())["rows"]
        assert len(found) == rows
        assert [row.get("error") for row in found[:2]] == ["the process was lost"] * min(rows, 2)
    assert all("ratio" in row for row in found[2:])


def test_steps_are_those_of_kernels_on_a_gpu(benchmarks: ModuleType) -> None:
    result = CliRunner().invoke(benchmarks.lstm.main, ["--suite", "steps", "--dtype", "fp32"])
    assert result.exit_code == 1
    assert "the forced backend 'cuda' can't serve this call" in result.output


def test_a_result_farther_than_expected_is_held_against_fp64(
    benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two bf16 results may differ by roundings that are nobody's fault."""
    strict = benchmarks.measure.Precision(torch.bfloat16, 0.0)
    monkeypatch.setitem(benchmarks.measure.DTYPES, "bf16", strict)
    case = benchmarks.suites.Case("small", B=3, T=9, input_size=5, hidden_size=17, shortest=4)
    row = benchmarks.suites.Row("tried here", case, "bf16", "forward+backward")
    assert benchmarks.measure.measured(row, "cpu", 2, 0)["distance"] > 0
    monkeypatch.setattr(benchmarks.measure, "FusedLSTM", WrongGradient)
    with pytest.raises(benchmarks.measure.WrongResult, match="in fp64"):
        benchmarks.measure.measured(row, "cpu", 2, 0)


@pytest.mark.parametrize(("B", "shortest"), [(1, 3), (3, 9), (5, 1), (9, 2)])
def test_packed_cases(benchmarks: ModuleType, B: int, shortest: int) -> None:
    case = benchmarks.suites.Case("packed", B, 9, 5, 17, shortest=shortest)
    sizes = case.batch_sizes()
    assert len(sizes) == 9 and sizes[0] == B
    lengths = [sum(size > b for size in sizes) for b in range(B)]
    assert lengths[0] == 9 and lengths[-1] == (shortest if B > 1 else 9)
    falls = {a - b for a, b in zip(lengths, lengths[1:], strict=False)}
    assert not falls or max(falls) - min(falls) <= 1  # evenly
    row = benchmarks.suites.Row("tried here", case, "fp32", "forward")
    packed = benchmarks.measure.prepared("torch", row).x
    back = torch.nn.utils.rnn.pad_packed_sequence(packed)[1]
    assert back.tolist() == lengths
    line = benchmarks.report.line(row.facts() | benchmarks.measure.measured(row, "cpu", 2, 0))
    assert f"shortest={shortest}" in line


def test_pairs_alternate_and_ratios_are_of_neighbours(
    benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock of our own: the machine slows down at each timing, the ratio must not."""
    monkeypatch.setattr(benchmarks.timing, "WARM_UP_S", 0)
    order = []
    slowness = 1.0

    def baseline() -> None:
        order.append("A")

    def candidate() -> None:
        order.append("B")

    def clock(call, calls: int) -> float:  # type: ignore[no-untyped-def]
        nonlocal slowness
        call()
        slowness *= 1.01
        return calls * slowness * (3e-4 if call is baseline else 1e-4)

    sides = {"torch": baseline, "fused": candidate}
    timed = benchmarks.timing.timed(sides, clock, repeats=7, min_time=0)
    assert "".join(order) == "AB" * 2 + "ABBA" * 4
    assert timed["pairs"] == 8
    assert timed["calls"] == 10  # the quicker takes 0.1 ms a call, a timing at least 1 ms
    assert timed["ratio"] == pytest.approx(3, rel=1e-3)
    first, third = timed["ratio_quartiles"]
    assert 2.9 < first < timed["ratio"] < third < 3.1
    assert timed["torch_ms"] == pytest.approx(3 * timed["fused_ms"], rel=0.02)


def test_suites_are_well_formed(benchmarks: ModuleType) -> None:
    for name, suite in benchmarks.suites.SUITES.items():
        names = [case.name for case in suite.cases]
        assert names and (len(set(names)) == len(names) or name == "steps")
        dtypes = {*suite.dtypes, *(dtype for case in suite.cases for dtype in case.dtypes)}
        assert suite.dtypes and dtypes <= set(benchmarks.measure.DTYPES)
        assert suite.how in benchmarks.lstm.HOW


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "sonets"], "sonets: suite seeds has frankenstein, sonnets"),
        (["--dtype", "tf32"], "CUDA only"),
        (["--keep", "--case", "sonnets"], "whole suite"),
        (["--suite", "nowhere"], "'seeds'"),
        (["--repeats", "1"], "repeats"),
        (["--backend", "fast"], "unknown backend 'fast'"),
        (["--keep", "--backend", "reference"], "whole suite"),
    ],
)
def test_bad_arguments_are_explained(
    benchmarks: ModuleType, arguments: list[str], message: str
) -> None:
    result = CliRunner().invoke(benchmarks.lstm.main, arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_commit_is_dirty_for_anything_but_results(benchmarks: ModuleType, tmp_path: Path) -> None:
    commit = benchmarks.machine.commit
    results = tmp_path / "python" / "benchmarks" / "results"
    results.mkdir(parents=True)

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", *who, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    assert commit(results) == {}  # nothing committed yet
    git("commit", "--quiet", "--no-verify", "--allow-empty", "--message", "first")
    clean = {"commit": git("rev-parse", "HEAD")[:12], "dirty": False}
    assert commit(results) == clean
    (results / "machine-seeds-cpu.json").write_text("{}")
    assert commit(results) == clean
    (tmp_path / "kernel.cpp").write_text("")
    assert commit(results) == {**clean, "dirty": True}


def test_results_are_named_after_the_machine(benchmarks: ModuleType) -> None:
    slug = benchmarks.machine.slug
    processor = {"processor": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cores": 2}
    assert slug(processor) == "intel-xeon-platinum-8481c-cpu-2-70ghz-2-cores"
    assert slug({**processor, "gpu": "NVIDIA H200"}) == "nvidia-h200"
    zen_3 = {"processor": "AMD EPYC", "family_model_stepping": "25/1/1", "cores": 2}
    assert slug({**zen_3, "instruction_set": "avx2"}) == "amd-epyc-25-1-avx2-2-cores"


def test_kept_results_carry_the_name_of_their_machine(benchmarks: ModuleType) -> None:
    for path in benchmarks.report.RESULTS.glob("*.json"):
        assert path.name.startswith(
            benchmarks.machine.slug(json.loads(path.read_text())["machine"])
        ), path.name


@pytest.mark.parametrize("told", [{}, {"Socket(s)": "-", "Core(s) per socket": "4"}])
def test_machine_of_which_little_is_told(
    benchmarks: ModuleType, monkeypatch: pytest.MonkeyPatch, told: dict[str, str]
) -> None:
    monkeypatch.setattr(benchmarks.machine, "_lscpu", lambda: told)
    facts = benchmarks.machine.machine("cpu")
    assert facts["processor"] and facts["cores"] >= 1 and facts["family_model_stepping"] is None


def test_kept_results_are_whole_and_small(benchmarks: ModuleType) -> None:
    for path in benchmarks.report.RESULTS.glob("*.json"):
        report = json.loads(path.read_text())
        assert path.name.endswith(f"-{report['suite']}-{report['device']}.json")
        assert path.stat().st_size < (400_000 if report["benchmark"] == "gpu" else 100_000)
        if report["benchmark"] == "lstm":
            wanted = benchmarks.suites.rows(report["suite"], dtypes=report.get("dtypes", ()))
            rows = [(r["case"], r["dtype"], r["pass"], r.get("threads")) for r in report["rows"]]
            assert rows == [(r.case.name, r.dtype, r.pass_, r.threads) for r in wanted]
