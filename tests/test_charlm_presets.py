"""charlm's presets: what each source document asks for, and the errors that none repeats."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from charlm.checkpoint import Checkpoints
from charlm.cli import main
from charlm.commands.train import train as train_command
from charlm.corpus import builtin_text
from charlm.errors import CharlmError
from charlm.model import CELLS, CharacterModel
from charlm.optimisation import Place, Record, learning_rate, reason_to_stop
from charlm.presets import preset_names, read_preset
from charlm.runfolder import RunFolder
from charlm.settings import Config, settings
from charlm.training import Trainer
from click.testing import CliRunner, Result

TEXTS = {"sonnets.txt": (94_081, 61), "tinyshakespeare.txt": (1_115_394, 65)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with texts of the recipes' lengths and vocabularies, as CHARLM_DATA."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHARLM_DATA", str(tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def write(name: str) -> None:
    """Words of the letters that the prompts need, and as many others as the vocabulary has."""
    length, size = TEXTS[name]
    alphabet = "".join(map(chr, range(ord("A"), ord("A") + size - 2))) + "\n "
    order = torch.randint(size, (length - size,)).tolist()
    Path(name).write_text(alphabet + "".join(alphabet[index] for index in order))


def charlm_run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def train(*arguments: object) -> str:
    result = charlm_run("train", *arguments)
    assert result.exit_code == 0, result.output
    return result.output


def records(run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def facts(run: str) -> dict[str, object]:
    return json.loads(Path(run, "config.json").read_text())["facts"]


TINY = ["--hidden", 9, "--batch-size", 9]


def test_presets_are_listed_a_line_each() -> None:
    output = charlm_run("presets").output
    assert [line.split()[0] for line in output.splitlines()] == preset_names()
    assert set(preset_names()) == {
        "default", "frankenstein", "gpt-simple", "rnn-basics", "shakespeare", "sonnets",
        "sonnets-rnn", "tinyshakespeare", "tinyshakespeare-large",
    }  # fmt: skip
    assert all(len(line) <= 120 for line in output.splitlines())


@pytest.mark.parametrize(
    ("preset", "size", "parameters"),
    [("frankenstein", 60, 64_764), ("sonnets", 61, 1_208_893), ("sonnets-rnn", 61, 325_181),
     ("tinyshakespeare", 65, 350_593), ("tinyshakespeare-large", 65, 1_221_249)],
)  # fmt: skip
def test_parameters_are_the_documents(preset: str, size: int, parameters: int) -> None:
    config = read_preset(preset)[0]
    trainer = Trainer(config, np.arange(20_000, dtype=np.int64) % size, size)
    assert trainer.model.parameter_count() == parameters


def test_sonnets() -> None:
    write("sonnets.txt")
    output = train("--preset", "sonnets", "--run", "r", "--hidden", 5, "--epochs", 23,
                   "--length", 20)  # fmt: skip
    told = facts("r")
    assert (told["ids"], told["vocabulary"], told["batches"]) == (94_081, 61, 7)
    text = Path("sonnets.txt").read_text()
    assert f"characters  {''.join(sorted(set(text)))!r}" in output
    vocabulary = sorted(set(text))
    assert f"first 100:\n{text[:100]}\n{[vocabulary.index(c) for c in text[:100]]}" in output
    means = [record["train_loss"] for record in records("r")]
    shown = re.findall(r"^Epoch: (\d+), Loss: (\S+)$", output, re.MULTILINE)
    assert shown == [(str(epoch), f"{means[epoch]:.4f}") for epoch in (9, 19, 22)]
    config = RunFolder(Path("r")).read_config()
    assert (config.seed, config.lr, config.clip, config.dropout) == (76, 1e-3, 5.0, 0.5)
    assert (config.optimizer, config.top_k, config.embedding) == ("adam", 5, 0)
    assert Path("r/sample.txt").read_text().startswith("M")


def test_sonnets_rnn() -> None:
    write("sonnets.txt")
    output = train("--preset", "sonnets-rnn", "--run", "r", "--hidden", 5, "--epochs", 21,
                   "--length", 20)  # fmt: skip
    shown = re.findall(r"^Epoch: (\d+), Loss: ", output, re.MULTILINE)
    assert shown == ["0", "10", "20"]
    model, _ = RunFolder(Path("r")).read_model()
    assert model.recurrent.bias_hh_l0.count_nonzero() == 0
    assert model.recurrent.bias_ih_l0.count_nonzero() == 5
    assert Path("r/sample.txt").read_text().startswith("H")


def test_early_stop_looks_at_the_epochs_mean() -> None:
    config = Config(preset="", epochs=9, stop="below", stop_below=0.05)
    record = Record(1, 7, 0.06, None, 0, 0.1, 0.0)
    assert not reason_to_stop(config, []) and not reason_to_stop(config, [record])
    low = Record(2, 14, 0.049, None, 0, 0.1, 0.0)
    assert "below 0.05" in reason_to_stop(config, [record, low])
    write("sonnets.txt")
    output = train("--preset", "sonnets", "--run", "r", "--hidden", 5, "--stop-below", 4.2,
                   "--dropout", 0, "--lr", 1e-2, "--length", 9)  # fmt: skip
    means = [record["train_loss"] for record in records("r")]
    assert means[-1] < 4.2 <= min(means[:-1], default=math.inf)
    assert f"below 4.2: stopped at step {7 * len(means)}" in output


def test_gpt_simple() -> None:
    output = train("--preset", "gpt-simple", "--run", "r", "--hidden", 9, "--batch-size", 300,
                   "--epochs", 2, "--embedding", 7)  # fmt: skip
    lines = re.findall(
        r"^Ep (\d+) \(Step (\d{6})\): Train loss \d\.\d{3}, Val loss \d\.\d{3}$",
        output,
        re.MULTILINE,
    )
    steps = int(str(facts("r")["batches"])) * 2
    assert [step for _, step in lines] == [f"{step:06d}" for step in
                                           sorted({*range(0, steps, 5), steps - 1})]  # fmt: skip
    assert lines[0][0] == "1" and lines[-1][0] == "2"
    for record in records("r"):
        assert {"train_loss", "val_loss", "tokens_seen"} <= set(record)
    assert records("r")[0]["tokens_seen"] == 300 * 64
    samples = [line for line in output.splitlines() if line.startswith("Every effort moves you")]
    # After each epoch and at the end; newlines are spaces, so each is a line.
    assert len(samples) == 3 and all(len(line) == 72 for line in samples[:2])
    config = RunFolder(Path("r")).read_config()
    assert (config.validation, config.test, config.seed) == (0.1, 0.1, 123)
    assert (config.optimizer, config.lr, config.weight_decay) == ("adamw", 4e-4, 0.1)


def test_evaluation_restores_the_mode() -> None:
    config = read_preset("gpt-simple")[0].override({"batch_size": 9, "steps": 3, "dropout": 0.5})
    trainer = Trainer(config, np.arange(9_000) % 17, 17)
    for record in trainer.train():
        assert trainer.model.training and record.val_loss is not None
    trainer.model.eval()
    trainer._record(evaluated=True)
    assert not trainer.model.training  # restored, where the document forces train mode


def test_rnn_basics() -> None:
    output = train("--preset", "rnn-basics", "--run", "r", *TINY, "--steps", 3, "--length", 9)
    parts = [f"--- {name} ---" for name in ("data", "model", "training", "generation")]
    lines = output.splitlines()
    assert sorted(map(lines.index, parts)) == [lines.index(part) for part in parts]
    assert "perplexity" in output and "bits per character" in output
    assert RunFolder(Path("r")).read_config().cell == "rnn"


def test_shakespeare() -> None:
    write("tinyshakespeare.txt")
    output = train("--preset", "shakespeare", "--run", "r", *TINY, "--batch-size", 3000,
                   "--epochs", 3, "--length", 9)  # fmt: skip
    batches = facts("r")["batches"]
    first, last = (
        re.findall(
            rf"^ Iter:(\d) - Alpha:(\S+) - Batch {batch}/{batches} - Min Loss:(\S+) - "
            rf"Loss:(\d+\.\d{{5}}){end}$",
            output,
            re.MULTILINE,
        )
        for batch, end in ((1, " - (T.*)"), (batches, ""))
    )
    assert [line[0] for line in first] == [line[0] for line in last] == ["0", "1", "2"]
    assert [line[1] for line in first] == ["2.500", "2.475", "2.450"]  # x 0.99 a pass
    assert all(len(line[4]) == 71 for line in first)  # T and 70 more, newlines shown as spaces
    for line, record in zip(last, records("r"), strict=True):
        assert float(line[3]) == pytest.approx(math.exp(record["train_loss"]), abs=1e-4)
        assert float(line[2]) <= float(line[3]) + 1e-3
    minima = [float(line[2]) for line in last]
    assert minima == sorted(minima, reverse=True)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_trains_carries_its_state_and_samples(cell: str) -> None:
    Path("text.txt").write_text(builtin_text()[:12_000])
    arguments = ["--text", "text.txt", "--cell", cell, "--layers", 2, "--lr", 1e-2, *TINY]
    train("--run", "r", *arguments, "--steps", 60, "--eval-every", 30, "--length", 9)
    first, last = records("r")
    assert last["train_loss"] < first["train_loss"]
    model, vocabulary = RunFolder(Path("r")).read_model()
    ids = vocabulary.encode("The quick")[None]
    states = model.zero_states(1)
    assert len(states) == (2 if cell in ("fused", "lstm") else 1)
    whole, _ = model(ids, states)
    for index in range(ids.size(1)):
        logits, states = model(ids[:, index : index + 1], states)
        torch.testing.assert_close(logits, whole[index : index + 1])
    assert charlm_run("sample", "r", "--length", 5).output.startswith("The")


def test_the_linear_layer_is_fed_h_and_not_the_output_gate(seed: int) -> None:
    model = CharacterModel(7, embedding=0, hidden=5, layers=1, dropout=0.5, cell="fused").eval()
    ids = torch.tensor([[3, 1, 6]])
    lstm, (h, c) = model.recurrent, (torch.zeros(5), torch.zeros(5))
    logits, _ = model(ids, model.zero_states(1))
    for index, row in zip(ids[0], logits, strict=True):
        x = torch.nn.functional.one_hot(index, 7).float()
        gates = lstm.weight_ih_l0 @ x + lstm.bias_ih_l0 + lstm.weight_hh_l0 @ h + lstm.bias_hh_l0
        i, f, g, o = gates.split(5)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        torch.testing.assert_close(row, model.linear(h))


def test_xavier_weights_and_one_bias() -> None:
    config = Config(preset="", epochs=1, initial="xavier", biases=1, cell="gru", hidden=33)
    recurrent = Trainer(config, np.arange(9_000) % 17, 17).model.recurrent
    assert recurrent.bias_ih_l0.count_nonzero() == recurrent.bias_hh_l0.count_nonzero() == 0
    assert recurrent.bias_ih_l0.requires_grad and not recurrent.bias_hh_l0.requires_grad
    for weight in (recurrent.weight_ih_l0, recurrent.weight_hh_l0):
        for gate in weight.split(33):
            bound = math.sqrt(6 / sum(gate.shape))
            assert bound * 0.98 < gate.abs().max() <= bound


def rates(config: Config, places: list[Place]) -> list[float]:
    return [learning_rate(config, place) / config.lr for place in places]


def test_schedules() -> None:
    decay = Config(preset="", epochs=9, schedule="decay", decay=0.9, lr=2.0)
    places = [Place(step, 90, step // 10) for step in (0, 9, 10, 29)]
    assert rates(decay, places) == pytest.approx([1, 1, 0.9, 0.81])
    plateau = Config(preset="", epochs=9, schedule="plateau", decay=0.5, patience=2, lr=2.0)
    losses = [3.0, 2.0, 2.5, 2.0, 1.0, 1.0, 1.5, 1.2, 1.0, 0.9]
    seen = [Record(n, n, 9.0, loss, 0, 0.1, 0.0) for n, loss in enumerate(losses)]
    places = [Place(n, 99, n, seen[:n]) for n in range(len(seen) + 1)]
    assert rates(plateau, places) == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    patience = Config(preset="", epochs=9, stop="patience", patience=3)
    reasons = [bool(reason_to_stop(patience, seen[:n])) for n in range(len(seen) + 1)]
    assert reasons == [False] * 8 + [True] * 2 + [False]


def test_checkpoints_take_a_hundredth_of_the_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now = 100.0
    monkeypatch.setattr("charlm.checkpoint.time.perf_counter", lambda: now)

    def slow(path: Path, data: bytes) -> None:
        nonlocal now
        now += 0.25

    monkeypatch.setattr("charlm.checkpoint.write_atomically", slow)
    trainer = Trainer(read_preset("rnn-basics")[0], np.arange(9_000) % 17, 17)
    checkpoints = Checkpoints(tmp_path)
    saved = 0
    for step in range(1, 10_001):
        now += 0.01
        trainer.step = step
        if checkpoints.due(trainer):
            checkpoints.save(trainer, 0)
            saved += 1
    assert saved == 4  # after steps 1, 2,501, 5,001, 7,501: a second of a hundred
    every = Checkpoints(tmp_path, 7)
    due = []
    for trainer.step in range(1, 30):
        if every.due(trainer):
            due.append(trainer.step)
    assert due == [7, 14, 21, 28]


def test_a_preset_of_ones_own() -> None:
    Path("text.txt").write_text(builtin_text()[:12_000])
    Path("mine.toml").write_text(
        'description = "mine"\n[text]\nfile = "text.txt"\n[batches]\nwindow = 17\n'
        "[model]\nhidden = 9\n[optimisation]\nsteps = 3\n"
    )
    output = train("--preset", "mine.toml")
    assert "runs/mine-1" in output
    config = RunFolder(Path("runs/mine-1")).read_config()
    assert (config.preset, config.window, config.hidden, config.steps) == ("mine", 17, 9, 3)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("[text", "mine.toml can't be used"),
        ("[texts]\n", "texts is not one of the tables [text], [batches]"),
        ("[text]\nhidden = 3\n", "[text] has no setting hidden, but [model] does"),
        ("[model]\nhiden = 3\n", "[model] has no setting hiden"),
        ('[model]\nhidden = "3"\n', "hidden must be a whole number, got '3'"),
        ("[model]\nhidden = true\n", "hidden must be a whole number, got True"),
        ("[model]\nhidden = 0\n", "hidden must be positive, got 0"),
        ('[optimisation]\nschedule = "linear"\n', "schedule must be one of constant, cosine"),
        ("[text]\ncharacters = [1]\n", "characters must be a pair [FIRST, END], got [1]"),
        ("", "give one of epochs and steps"),
        (None, "cannot read the preset mine.toml: No such file or directory"),
    ],
)
def test_a_preset_that_is_none(toml: str | None, message: str) -> None:
    if toml is not None:
        Path("mine.toml").write_text(toml)
    result = charlm_run("train", "--preset", "mine.toml")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert message in " ".join(result.output.split())
    with pytest.raises(CharlmError):
        read_preset("absent")


def test_the_help_shows_every_setting_in_groups_the_common_ones_first() -> None:
    output = charlm_run("train", "--help").output
    groups = ["Run", "Text", "Batches", "Model", "Optimisation", "Output"]
    places = [output.index(f"\n{group} options:\n") for group in groups]
    assert places == sorted(places)
    for field in settings():
        if field.name not in ("file", "opening"):
            assert f"--{field.name.replace('_', '-')}" in output
    for common, rare in (("--text", "--characters"), ("--batch-size", "--stride"),
                         ("--hidden", "--biases"), ("--epochs", "--warmup"), ("--lr", "--decay"),
                         ("--prompt", "--log")):  # fmt: skip
        assert output.index(f"\n  {common} ") < output.index(f"\n  {rare} ")
    assert {option.group for option in train_command.params} == {group.lower() for group in groups}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("--hiden", "--hidden"), ("--learning-rate", "--lr"), ("--batchsize", "--batch-size"),
     ("--seq-length", "--window"), ("--num-layers", "--layers"), ("--epoch", "--epochs"),
     ("--reusme", "--resume"), ("--optimiser", "--optimizer"), ("--data", "--text")],
)  # fmt: skip
def test_a_wrong_options_name_suggests_the_right_one(wrong: str, right: str) -> None:
    result = charlm_run("train", wrong, "3")
    assert result.exit_code == 2
    assert re.search(rf"No such option '?{wrong}'?\.? .*{right}\b", result.output), result.output
