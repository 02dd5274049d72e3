"""Watching and looking back: the bar, events, and charlm plot, show, compare, eval."""

import contextlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from charlm import plot, results
from charlm.batches import rows_for_evaluation
from charlm.cli import main
from charlm.corpus import builtin_text
from charlm.evaluation import evaluate
from charlm.optimisation import Record
from charlm.runfolder import RunFolder
from charlm.watching import Events, Progress
from click.testing import CliRunner

TEXT = builtin_text()[:9_000]
SMALL = ["--hidden", "17", "--window", "17", "--batch-size", "9", "--embedding", "5",
         "--steps", "60", "--eval-every", "20", "--length", "40"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and two runs on it, "a" and "b", of which only "b" holds out a test."""
    folder = tmp_path_factory.mktemp("watching")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    for name, more in (
        ("a", ["--lr", "0.003"]),
        ("b", ["--lr", "0.01", "--test", "0.2", "--cell", "lstm"]),
    ):
        output = charlm("train", "--text", folder / "text.txt", "--run", folder / name, *SMALL,
                        *more)  # fmt: skip
        assert "saved in" in output
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHARLM_DATA", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def charlm(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.output
    return result.output


def records(step: int = 10, **changes: float | None) -> list[Record]:
    values = {"epoch": 1, "train_loss": 2.0, "val_loss": 2.5, "tokens_seen": 90, "lr": 0.1,
              "seconds": 1.5} | changes  # fmt: skip
    return [Record(**{**values, "step": n * step}) for n in range(1, 4)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    with Progress(30, stream=stream, every=0) as progress:
        for _ in range(10):
            progress.step(torch.tensor(math.log(8)), 100)
        progress.say("Step 10/30, Loss: 2.0794")
    shown = stream.getvalue().split("\r")
    last = next(line for line in reversed(shown) if "loss" in line)
    assert "33%" in last and "10/30" in last and " left" in last
    assert re.search(r"loss 2.079, perplexity 8.00, [\d,]+ characters/s", last)
    assert shown[-1].strip() == "", "the bar stays"
    assert capsys.readouterr().out == "Step 10/30, Loss: 2.0794\n"


def test_a_terminal_that_does_not_know_its_size_gets_one_too() -> None:
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as stream, Progress(30, stream=stream, every=0) as progress:
        progress.step(torch.tensor(1.0), 100)
    shown = b""
    with contextlib.suppress(OSError):  # so the system says that nobody writes any more
        while data := os.read(reader, 9_999):
            shown += data
    os.close(reader)
    assert b"loss 1.000" in shown


def test_elsewhere_there_are_lines_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    with Progress(30, step=5, stream=stream, every=0) as progress:
        progress.step(torch.tensor(1.0), 100)
    (line,) = stream.getvalue().splitlines()
    assert re.fullmatch(
        r"step 6/30, loss 1.000, perplexity 2.72, [\d,]+ characters/s, 00:\d\d left", line
    )
    quiet = io.StringIO()
    with Progress(3, stream=quiet) as progress:
        progress.step(torch.tensor(1.0), 100)
        progress.say("Epoch 1/1")
    assert quiet.getvalue() == "" and capsys.readouterr().out == "Epoch 1/1\n"


class Unread:
    def item(self) -> float:
        raise AssertionError("the loss was read, and a GPU would have waited")


def test_a_loss_is_read_only_when_it_is_shown() -> None:
    with Progress(30, stream=Terminal(), every=60) as progress:
        progress.step(Unread(), 100)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_a_run_has_events(runs: Path) -> None:
    found = scalars(runs / "a")
    lines = [json.loads(line) for line in (runs / "a/metrics.jsonl").read_text().splitlines()]
    for name, key in (("loss/training", "train_loss"), ("loss/validation", "val_loss"),
                      ("learning rate", "lr"), ("characters", "tokens_seen")):  # fmt: skip
        assert [step for step, _ in found[name]] == [20, 40, 60]
        values = [value for _, value in found[name]]
        assert values == pytest.approx([line[key] for line in lines], rel=1e-6)
    assert found["perplexity/validation"][-1][1] == pytest.approx(math.exp(lines[-1]["val_loss"]))


def test_events_after_the_step_where_training_goes_on_are_taken_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    first, second, third = records(val_loss=None)
    with Events(tmp_path) as events:
        for record in (first, second, third):
            events.add(record)
    with Events(tmp_path, step=first.step) as events:
        events.add(second)
    found = scalars(tmp_path)
    assert [step for step, _ in found["loss/training"]] == [10, 20]
    assert "loss/validation" not in found


def test_without_tensorboard_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Events(tmp_path) as events:
        events.add(records()[0])
    assert not list(tmp_path.iterdir())


def test_plot_of_one_run_lies_in_it(runs: Path) -> None:
    pytest.importorskip("matplotlib")
    assert charlm("plot", runs / "a") == f"wrote {runs / 'a/loss.png'}\n"
    data = (runs / "a/loss.png").read_bytes()
    assert data.startswith(b"\x89PNG") and 10_000 < len(data) < 150_000
    charlm("plot", runs / "a")
    assert (runs / "a/loss.png").read_bytes() == data, "other bytes from the same run"


def test_the_legend_of_several_runs_hides_no_line() -> None:
    pytest.importorskip("matplotlib")
    axes = plot.figure({"a": records(), "b": records()}).axes[0]
    axes.figure.draw_without_rendering()
    legend = axes.get_legend()
    assert legend and legend.get_window_extent().ymin >= axes.get_window_extent().ymax


@pytest.mark.parametrize("over", plot.OVER)
def test_plot_of_several_runs(runs: Path, over: str) -> None:
    pytest.importorskip("matplotlib")
    charlm("plot", runs / "a", runs / "b", "--over", over, "--out", "both.svg")
    drawn = Path("both.svg").read_text(encoding="utf-8")
    assert drawn.startswith("<?xml") and plot.OVER[over][1] in drawn
    for words in ("training a", "validation a, lowest", "training b", "learning rate"):
        assert words in drawn


def test_lines_are_told_apart_without_colours() -> None:
    pytest.importorskip("matplotlib")
    colors = pytest.importorskip("matplotlib.colors")
    names = ["a", "b", "c", "d", "e"]
    figure = plot.figure({name: records() for name in names})
    loss, rate = figure.axes[:2]
    looks = {(line.get_marker(), line.get_linestyle()) for line in loss.lines}
    assert len(loss.lines) == len(looks) == 2 * len(names) and len(rate.lines) == len(names)
    greys = []
    for color in plot.COLOURS:
        red, green, blue = colors.to_rgb(color)
        greys.append(0.3 * red + 0.59 * green + 0.11 * blue)
    assert all(b - a > 0.1 for a, b in zip(greys, greys[1:], strict=False)) and greys[-1] < 0.75


def test_plot_takes_any_name_and_number(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    odd = {
        "$a_{": records(), "_hidden": records(val_loss=None), "\u5b57\n\x1b[2J": records()[:1],
        "huge": records(train_loss=1e308, tokens_seen=2**62), "zero": records(step=0, lr=0),
    }  # fmt: skip
    for over in plot.OVER:
        for suffix in plot.SUFFIXES:
            plot.save(plot.figure(odd, over), tmp_path / f"odd{suffix}")
            assert (tmp_path / f"odd{suffix}").stat().st_size > 5_000


def test_plot_refuses(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "neither FILE.png nor FILE.svg" in refused("plot", runs / "a", "--out", "a.pdf")
    assert "cannot write absent/a.png: No such" in refused("plot", runs / "a", "--out",
                                                           "absent/a.png")  # fmt: skip
    (tmp_path / "empty").mkdir()
    assert "empty has no config.json" in refused("plot", "empty")
    assert "is not one of 'steps'" in refused("plot", runs / "a", "--over", "days")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert 'pip install "matplotlib' in refused("plot", runs / "a")


def test_show(runs: Path) -> None:
    shown = charlm("show", runs / "b")
    lines = {line.split("  ")[1]: line.split("  ")[-1].strip()
             for line in shown.splitlines() if line.startswith("  ")}  # fmt: skip
    found = [json.loads(line) for line in (runs / "b/metrics.jsonl").read_text().splitlines()]
    best = min(found, key=lambda record: record["val_loss"])
    model, _ = RunFolder(runs / "b").read_model()
    assert lines["cell"] == "lstm" and lines["lr"] == "0.01" and lines["hidden"] == "17"
    assert lines["parameters"] == f"{model.parameter_count():,}"
    assert lines["best loss"] == f"{best['val_loss']:.4f}, validation"
    assert lines["at step"] == str(best["step"]) and lines["steps"] == "60"
    assert lines["its perplexity"] == f"{math.exp(best['val_loss']):.2f}"
    assert shown.endswith("sample\n" + (runs / "b/sample.txt").read_text(encoding="utf-8") + "\n")


def test_show_of_a_run_that_has_just_begun(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.json").write_bytes((runs / "a/config.json").read_bytes())
    shown = charlm("show", "begun")
    assert "not as far as the first record" in shown and shown.endswith("no sample yet\n")
    assert "absent has no config.json" in refused("show", "absent")


def test_compare(runs: Path) -> None:
    rows = [re.split(r" {2,}", line) for line in charlm("compare", runs / "a", runs / "b")
            .splitlines()]  # fmt: skip
    table = {row[0]: row[1:] for row in rows}
    assert rows[0] == ["", "a", "b"]
    assert table["cell"] == ["fused", "lstm"] and table["lr"] == ["0.003", "0.01"]
    assert "hidden" not in table, "what is equal is shown"
    assert table["steps"] == ["60", "60"]
    assert all(float(cell.split(",")[0]) > 1 for cell in table["best loss"])
    for arguments in ([runs / "a"], [runs / "a", runs / "a"]):
        assert "give two runs or more" in refused("compare", *arguments)


def test_results_without_validation_or_records() -> None:
    rows = results.results(records(val_loss=None, seconds=0.0))
    assert rows["best loss"] == "2.0000, training" and rows["characters/s"] == "-"
    assert "validation loss" not in rows
    assert results.results([]) == {"trained": "not as far as the first record"}


def evaluated(*arguments: object) -> dict[str, str]:
    return dict(re.split(r" {2,}", line) for line in charlm("eval", *arguments).splitlines())


def test_eval_finds_the_validation_loss_of_training(runs: Path) -> None:
    rows = evaluated(runs / "a")
    last = json.loads((runs / "a/metrics.jsonl").read_text().splitlines()[-1])
    assert rows["split"] == "validation" and rows["loss"] == f"{last['val_loss']:.4f}"
    loss = float(rows["loss"])
    assert float(rows["perplexity"]) == pytest.approx(math.exp(loss), rel=1e-3)
    assert float(rows["bits per character"]) == pytest.approx(loss / math.log(2), rel=1e-3)
    assert float(rows["characters a second"].replace(",", "")) > 0
    # 900 characters are held out: 9 rows of 99, all but the end of which is evaluated.
    assert rows["characters"] == "891"


def test_eval_of_each_part(runs: Path) -> None:
    parts = {part: evaluated(runs / "b", "--split", part)
             for part in ("train", "validation", "test", "all")}  # fmt: skip
    assert evaluated(runs / "b")["loss"] == parts["test"]["loss"]
    assert len({rows["loss"] for rows in parts.values()}) == 4
    model, vocabulary = RunFolder(runs / "b").read_model()
    test = vocabulary.encode(TEXT[-1_800:]).numpy()
    expected = evaluate(model, rows_for_evaluation(test, 17, 9))
    assert parts["test"]["loss"] == f"{expected:.4f}"
    wide = evaluated(runs / "b", "--batch-size", 1)
    assert wide["characters"] == "1,799" and wide["loss"] != parts["test"]["loss"]


def test_eval_of_another_text(runs: Path, tmp_path: Path) -> None:
    Path("other.txt").write_text(TEXT[100:2_000], encoding="utf-8")
    assert evaluated(runs / "a", "--text", "other.txt", "--split", "all")["characters"] == "1,899"
    assert "is not the text that the run was trained on" in refused(
        "eval", runs / "a", "--text", "other.txt"
    )
    Path("strange.txt").write_text("The \u2603" * 99, encoding="utf-8")
    message = refused("eval", runs / "a", "--text", "strange.txt", "--split", "all")
    assert "strange.txt has the character '\u2603'" in message
    Path("short.txt").write_text("The", encoding="utf-8")
    message = refused("eval", runs / "a", "--text", "short.txt", "--split", "all")
    assert "3 characters, too few for one window of 17" in message


def test_eval_refuses(runs: Path, tmp_path: Path) -> None:
    message = refused("eval", runs / "a", "--split", "test")
    assert "holds no test part out: its text is for train, validation" in message
    assert "cannot use device 'absent'" in refused("eval", runs / "a", "--device", "absent")
    config = json.loads((runs / "a/config.json").read_text(encoding="utf-8"))
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes((runs / "a/model.safetensors").read_bytes())
    for sources, message in (
        (["/dev/zero"], "text was /dev/zero, which isn't there"),
        (["-"], "text was standard input, which isn't there"),
        (["\0"], "which isn't there"),
        (["a" * 9_999], "which isn't there"),
        ("/etc/passwd", "sources are no list of files"),
        (["/etc/passwd"], "passwd"),
    ):
        config["facts"]["sources"] = sources
        (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert message in refused("eval", copy)
