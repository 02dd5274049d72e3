"""The benchmark of charlm's training: what it reports, and that its sides train the same model."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from charlm.model import CharacterModel
from charlm.training import hyperparameters
from click.testing import CliRunner

PYTHON = Path(__file__).resolve().parent.parent / "python"
# Not in bf16, in which nn.LSTM cannot train where the processor has AVX2 and no more.
ONE_ROW = ["--preset", "frankenstein", "--dtype", "fp32", "--threads", "1", "--seconds", "0"]


@pytest.fixture
def charlm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, whose package is run from its folder and not installed."""
    monkeypatch.syspath_prepend(str(PYTHON))
    import benchmarks.charlm

    return benchmarks.charlm


def test_a_row(charlm: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = CliRunner().invoke(charlm.main, [*ONE_ROW, "--out", str(out)])
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    assert (document["benchmark"], document["suite"]) == ("charlm", "charlm")
    (row,) = document["rows"]
    assert [row[key] for key in ("case", "B", "T", "I", "H")] == ["frankenstein", 36, 48, 48, 96]
    assert (row["dtype"], row["pass"], row["threads"]) == ("fp32", "training step", 1)
    for ms, characters in (
        (row["fused_ms"], row["fused_characters_per_s"]),
        (row["torch_ms"], row["torch_characters_per_s"]),
        (row["plain"]["ms"], row["plain"]["characters_per_s"]),
    ):
        assert characters == pytest.approx(36 * 48 / ms * 1e3, rel=1e-3)
    for peer in (row, row["plain"]):
        first, third = peer["ratio_quartiles"]
        assert 0 < first <= peer["ratio"] <= third
    assert f"torch_ms {row['torch_ms']} " in result.output


def test_ratios_are_of_neighbours_in_time(charlm: ModuleType) -> None:
    """The machine slows down fourfold from the first round to the last."""
    times = {"torch": [4.0, 8.0, 16.0], "fused": [1.0, 2.0, 4.0], "plain": [2.0, 6.0, 16.0]}
    facts = charlm.summary(times, 64)
    assert (facts["fused_ms"], facts["fused_characters_per_s"]) == (2000, 32)
    assert (facts["torch_ms"], facts["ratio"], facts["ratio_quartiles"]) == (8000, 4, [4, 4])
    assert facts["plain"] == {
        "ms": 6000, "characters_per_s": 11, "ratio": 3, "ratio_quartiles": [2.5, 3.5],
    }  # fmt: skip


def test_a_side_that_takes_too_long_is_an_error_of_its_row(
    charlm: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(charlm, "LIMIT_S", 0.0)
    out = tmp_path / "out.json"
    result = CliRunner().invoke(charlm.main, [*ONE_ROW, "--dtype", "bf16", "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [(row["dtype"], row["error"]) for row in rows] == [
        ("fp32", "torch: over 0 s"), ("bf16", "torch: over 0 s"),
    ]  # fmt: skip
    assert not any("fused_ms" in row for row in rows)


def test_every_preset_is_there_and_the_plain_model_is_as_large(charlm: ModuleType) -> None:
    names = {"default", "frankenstein", "gpt-simple", "shakespeare", "sonnets", "tinyshakespeare",
             "tinyshakespeare-large"}  # fmt: skip
    assert set(charlm.PRESETS) == names | {"default-512"}
    trainers = charlm.trainers
    for config in charlm.PRESETS.values():
        ours = CharacterModel(trainers.VOCABULARY, **hyperparameters(config))
        plain = trainers.PlainModel(config)
        assert sum(of.numel() for of in plain.parameters()) == ours.parameter_count()
    assert charlm.PRESETS["default-512"].hidden == 512


def test_losses_of_runs(charlm: ModuleType, tmp_path: Path) -> None:
    from benchmarks import losses
    from charlm.cli import main

    run, out = tmp_path / "run", tmp_path / "out.json"
    options = ["--steps", 3, "--hidden", 9, "--seed", 7, "--dtype", "bfloat16", "--run", run]
    assert CliRunner().invoke(main, ["train", *map(str, options)]).exit_code == 0
    result = CliRunner().invoke(losses.main, [str(run), "--out", str(out)])
    assert result.exit_code == 0, result.output
    (row,) = json.loads(out.read_text())["rows"]
    assert [row[key] for key in ("case", "H", "dtype", "seed", "steps")] == [
        "default", 9, "bf16", 7, 3
    ]  # fmt: skip
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["val_loss"] == pytest.approx(record["val_loss"], abs=1e-4)


def test_keep_wants_all_rows(charlm: ModuleType) -> None:
    result = CliRunner().invoke(charlm.main, ["--keep", *ONE_ROW])
    assert result.exit_code == 2
    assert "--keep wants all rows" in result.output
