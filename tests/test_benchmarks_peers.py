"""The benchmark of whole sequences beside other libraries: what it reports, and that what it asks
of them is nn.LSTM."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

PYTHON = Path(__file__).resolve().parent.parent / "python"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, whose package is run from its folder and not installed."""
    monkeypatch.syspath_prepend(str(PYTHON))
    import benchmarks.peers

    return benchmarks.peers


def test_a_row(peers: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ["--case", "odd-both", "--peer", "torch", "--rounds", "2", "--seconds", "0"]
    result = CliRunner().invoke(peers.main, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert (document["benchmark"], document["suite"]) == ("peers", "peers")
    (row,) = document["rows"]
    assert row["fused_ms"] == min(row["fused_ms_threads"].values())
    assert row["fused_ms_threads"].keys() == {"1", "2"}
    assert row["torch_ms"] > 0 and row["ratio"] > 0
    assert f"{row['dtype']:<5} {row['pass']}" in result.output


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("side", ["fp32", "onnxruntime", "openvino"])
def test_a_side_gives_nn_lstms_output(
    peers: ModuleType, side: str, options: dict[str, int]
) -> None:
    from benchmarks.measure import distance
    from benchmarks.turns import EXACT

    steppers = peers.steppers
    if package := steppers.missing(side):
        pytest.skip(f"{package} isn't installed")
    case = peers.Case("odd", 3, 7, 5, 17, **options)
    expected = steppers.sequence("torch", case).call()
    actual = torch.as_tensor(steppers.sequence(side, case).call())
    assert actual.shape == expected.shape == (7, 3, case.width)
    assert distance(actual, expected) < EXACT


def test_a_case_that_isnt_there(peers: ModuleType) -> None:
    result = CliRunner().invoke(peers.main, ["--case", "no-such-case"])
    assert result.exit_code == 2
    assert "no-such-case: there are diarisation, separation," in result.output
