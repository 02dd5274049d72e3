"""The benchmark of single steps: what it reports, and what it leaves out with words."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

PYTHON = Path(__file__).resolve().parent.parent / "python"
SHORT = ["--threads", "1", "--rounds", "2", "--seconds", "0"]


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, whose package is run from its folder and not installed."""
    monkeypatch.syspath_prepend(str(PYTHON))
    import benchmarks.streaming

    return benchmarks.streaming


@pytest.mark.parametrize("case", ["step-64", "text-96"])
def test_rows_of_a_case(streaming: ModuleType, tmp_path: Path, case: str) -> None:
    out = tmp_path / "out.json"
    arguments = ["--case", case, "--peer", "torch", *SHORT, "--out", str(out)]
    result = CliRunner().invoke(streaming.main, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert (document["benchmark"], document["suite"]) == ("streaming", "streaming")
    batches = (1, 32) if case == "text-96" else (1,)
    assert [(row["B"], row["dtype"]) for row in document["rows"]] == [
        (B, width) for B in batches for width in ("fp32", "bf16", "int8")
    ]
    for row in document["rows"]:
        assert row["fused_ms"] > 0 and row["torch_ms"] > 0 and row["ratio"] > 0
        assert f"{row['dtype']:<5} {row['pass']}" in result.output
    if case == "step-64":
        wide, half, bytes_ = (row["weight_bytes"] for row in document["rows"])
        assert wide > half > bytes_ >= 4 * 64 * (64 + 64)


def test_the_quicker_number_of_threads_counts(streaming: ModuleType) -> None:
    times = {
        ("torch", 1): [[9.0, 9.0], [9.0, 9.0]],
        ("torch", 2): [[4.0, 4.0], [8.0, 8.0]],
        ("onnxruntime", 1): [[2.0, 2.0], [2.0, 2.0]],
        ("fp32", 1): [[1.0, 1.0], [2.0, 2.0]],
        ("fp32", 2): [[3.0, 3.0], [3.0, 3.0]],
        ("int8", 1): [[0.5, 0.5], [0.5, 0.5]],
    }
    facts = streaming.summary(times, "fp32")
    assert (facts["fused_threads"], facts["torch_threads"]) == (1, 2)
    assert (facts["fused_ms"], facts["torch_ms"], facts["ratio"]) == (1500, 6000, 4)
    assert facts["onnxruntime"]["ratio"] == 1.5
    assert facts["onnxruntime"]["ratio_quartiles"] == [1.25, 1.75]
    assert streaming.summary(times, "int8")["ratio"] == 12


def test_a_peer_that_isnt_installed_is_left_out(
    streaming: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(streaming.steppers.NEEDS, "openvino", ("no_such_package",))
    arguments = ["--case", "step-64", "--peer", "openvino", *SHORT]
    result = CliRunner().invoke(streaming.main, arguments)
    assert result.exit_code == 0, result.output
    assert "skipped: openvino, for no_such_package isn't installed" in result.output
    assert "no_such_package: not installed" in result.output


def test_what_is_not_nn_lstms_is_not_timed(
    streaming: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import turns

    monkeypatch.setitem(turns.TOLERANCE, "int8", 0.0)
    result = CliRunner().invoke(streaming.main, ["--case", "step-64", "--peer", "torch", *SHORT])
    assert result.exit_code == 1
    assert "WrongResult: int8 is " in result.output


def test_a_side_that_fails_says_why(streaming: ModuleType) -> None:
    from benchmarks.turns import sides_of

    with pytest.raises(RuntimeError, match="no_such_side: KeyError"):
        make = partial(streaming.steppers.stepper, case=streaming.CASES[0])
        with sides_of(make, ("no_such_side",), (1,)):
            pass
