"""charlm train: runs on real text, what they write, and what they refuse."""

import functools
import io
import json
import math
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from charlm.cli import main
from charlm.corpus import Text, builtin_text, read_corpus
from charlm.interrupt import Interrupt
from charlm.model import CharacterModel
from charlm.presets import read_preset
from charlm.runfolder import RunFolder
from charlm.training import Trainer
from click.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--hidden", "33", "--window", "17", "--batch-size", "9", "--embedding", "12"]
KEYS = {"epoch", "step", "train_loss", "tokens_seen", "lr", "seconds"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test runs in a folder of its own, with no texts to be found, on one thread.

    Steps this small gain nothing from a second thread and lose much when the machine is busy.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHARLM_DATA", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(builtin_text()[:12_000], encoding="utf-8")
    return path


def charlm(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def succeed(*arguments: object, stdin: bytes | None = None) -> str:
    result = charlm(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.output


def fail(*arguments: object) -> str:
    """The message of a command that must end with one, not with a traceback."""
    result = charlm(*arguments)
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.output
    assert "Error: " in result.output and "Traceback" not in result.output
    return result.output


def records(run: str | Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("cell", ["fused", "lstm"])
def test_run_learns_and_writes_its_folder(text: Path, cell: str) -> None:
    output = succeed("train", "--text", text, "--run", "r", "--cell", cell, "--lr", 0.01,
                     "--steps", 500, *SMALL)  # fmt: skip
    names = {path.name for path in Path("r").iterdir()}
    assert {name for name in names if not name.startswith("events.out.tfevents.")} == {
        "config.json", "model.safetensors", "metrics.jsonl", "sample.txt",
        "checkpoint.safetensors", ".lock",
    }  # fmt: skip
    first, last = records("r")
    assert set(first) == set(last) == KEYS | {"val_loss"}
    assert (first["step"], last["step"]) == (250, 500)
    assert last["tokens_seen"] == 500 * 9 * 17
    # 10,800 characters in 9 rows of 1,199 are 70 batches of 17; 500 steps end in the 8th epoch.
    assert (first["epoch"], last["epoch"]) == (4, 8)
    assert 0 < last["lr"] < first["lr"] < 0.01
    assert 0 < first["seconds"] < last["seconds"]
    config = json.loads(Path("r/config.json").read_text(encoding="utf-8"))
    # Knowing how frequent each character is would give the entropy; this knows more.
    counts = Counter(text.read_text(encoding="utf-8")).values()
    entropy = -sum(count / 12_000 * math.log(count / 12_000) for count in counts)
    assert last["train_loss"] < entropy - 0.7 < first["train_loss"] < math.log(len(counts))
    assert last["val_loss"] < first["val_loss"]
    assert config["cell"] == cell and config["hidden"] == 33 and config["prompt"] == "The"
    loss = last["val_loss"]
    assert (
        f"Step 500/500, Loss: {last['train_loss']:.4f}, validation loss: {loss:.4f} "
        f"(perplexity {math.exp(loss):.2f}, {loss / math.log(2):.3f} bits per character)"
    ) in output
    sample = Path("r/sample.txt").read_text(encoding="utf-8")
    assert sample.startswith("The") and len(sample) == 503 and sample in output


def test_cells_start_equal_and_stay_close(text: Path) -> None:
    models = {}
    for cell in ("fused", "lstm"):
        torch.manual_seed(3)
        models[cell] = CharacterModel(
            17, embedding=12, hidden=33, layers=2, dropout=0.0, cell=cell
        ).state_dict()
    assert list(models["fused"]) == list(models["lstm"])
    assert all(torch.equal(models["fused"][name], value) for name, value in models["lstm"].items())
    losses = {}
    for cell in ("fused", "lstm"):
        # Without dropout: the masks of the two differ.
        succeed("train", "--text", text, "--run", cell, "--cell", cell, "--steps", 30,
                "--dropout", 0, *SMALL)  # fmt: skip
        losses[cell] = records(cell)[0]["train_loss"]
    assert losses["fused"] == pytest.approx(losses["lstm"], abs=1e-4)


def trains_in_bfloat16(lstm: torch.nn.LSTM) -> bool:
    """oneDNN has no bfloat16 for training where a processor has AVX2 and no more."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            lstm(torch.ones(2, 2, lstm.input_size))[0].sum().backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("cell", ["fused", "lstm", "gru"])
def test_bfloat16_learns_as_float32(text: Path, cell: str) -> None:
    if cell == "lstm" and not trains_in_bfloat16(torch.nn.LSTM(3, 5)):
        pytest.skip("nn.LSTM can't be trained in bfloat16 on this processor")
    losses = {}
    for dtype in ("float32", "bfloat16"):
        succeed("train", "--text", text, "--run", dtype, "--cell", cell, "--dtype", dtype,
                "--steps", 60, "--dropout", 0, *SMALL)  # fmt: skip
        losses[dtype] = records(dtype)[-1]["train_loss"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
    assert losses["bfloat16"] != losses["float32"]
    model, _ = RunFolder(Path("bfloat16")).read_model()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_bfloat16_that_torch_cannot_train_is_refused_in_one_line(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("could not create a primitive. Run it with ONEDNN_VERBOSE=all.")

    monkeypatch.setattr(torch.nn.LSTM, "forward", refuse)
    output = fail("train", "--text", text, "--run", "run", "--cell", "lstm",
                  "--dtype", "bfloat16", *SMALL)  # fmt: skip
    assert output.count("\n") == 1 and "(could not create a primitive): --cell fused" in output
    assert not Path("run").exists()


@pytest.mark.parametrize("batches", ["rows", "windows"])
def test_parts_of_a_batch_one_after_the_other_make_the_same_steps(text: Path, batches: str) -> None:
    for parts in (1, 4):
        succeed("train", "--text", text, "--run", f"parts{parts}", "--accumulate", parts,
                "--batches", batches, "--steps", 20, "--dropout", 0, *SMALL)  # fmt: skip
    whole, cut = (records(f"parts{parts}")[-1] for parts in (1, 4))
    assert cut["tokens_seen"] == whole["tokens_seen"]
    assert cut["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-5)
    assert cut["val_loss"] == pytest.approx(whole["val_loss"], abs=1e-5)


def test_compiled_it_makes_the_same_steps(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Inductor, whose code isn't ours and takes half a minute to make."""
    compile = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr("charlm.training.torch.compile", compile)
    for run, option in (("eager", "--no-compile"), ("compiled", "--compile")):
        succeed("train", "--text", text, "--run", run, option, "--steps", 9, "--dropout", 0, *SMALL)
    eager, compiled = (records(run)[-1]["train_loss"] for run in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, abs=1e-4)
    RunFolder(Path("compiled")).read_model()  # its weights have their own names


def test_no_arguments_train_on_the_builtin_text_in_fresh_folders() -> None:
    for number in (1, 2):
        succeed("train", "--steps", 1, "--hidden", 4)
        config = json.loads(Path(f"runs/default-{number}/config.json").read_text(encoding="utf-8"))
        assert config["facts"]["ids"] == len(builtin_text()) > 300_000
        assert config["file"] is None and config["preset"] == "default"


@pytest.mark.parametrize("cell", ["fused", "lstm"])
@pytest.mark.parametrize("batches", ["rows", "windows"])
def test_a_seed_decides_every_bit(text: Path, cell: str, batches: str) -> None:
    # The windows are frankenstein's, on a text whose part of them fits.
    arguments = ["--text", text, "--cell", cell, "--layers", 2, "--dropout", 0.2, *SMALL]
    if batches == "windows":
        arguments += ["--preset", "frankenstein", "--prompt", "The", "--epochs", 1]
        arguments += ["--batch-size", 100]
    else:
        arguments += ["--steps", 30]
    for run, seed in (("a", 5), ("b", 5), ("c", 6)):
        succeed("train", "--run", run, "--seed", seed, *arguments)
    a, b, c = ([{**record, "seconds": 0} for record in records(run)] for run in "abc")
    assert a == b and a[0]["train_loss"] != c[0]["train_loss"]
    for name in ("model.safetensors", "sample.txt"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()
        assert Path("a", name).read_bytes() != Path("c", name).read_bytes()


def test_text_from_standard_input_is_the_same_text(text: Path) -> None:
    succeed("train", "--text", text, "--run", "file", "--steps", 3, *SMALL)
    succeed("train", "--text", "-", "--run", "stdin", "--steps", 3, *SMALL, stdin=text.read_bytes())
    assert records("file")[0]["train_loss"] == records("stdin")[0]["train_loss"]


def test_one_hot_and_short_validation(text: Path) -> None:
    text.write_text(builtin_text()[:300])  # 30 characters held out, no window of 48
    output = succeed("train", "--text", text, "--run", "r", "--embedding", 0, "--epochs", 2,
                     "--window", 48, "--batch-size", 2, "--hidden", 8)  # fmt: skip
    assert "no validation loss: the 30 characters held out don't fill one window of 48" in output
    assert [set(record) for record in records("r")] == [KEYS]
    model, vocabulary = RunFolder(Path("r")).read_model()
    assert model.recurrent.weight_ih_l0.shape == (32, len(vocabulary))


def test_interrupt_saves_and_says_so(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._step

    def step_then_interrupt(self: Trainer, *batch: torch.Tensor) -> torch.Tensor:
        loss = step(self, *batch)
        if self.step == 3:
            signal.raise_signal(signal.SIGINT)
        return loss

    monkeypatch.setattr(Trainer, "_step", step_then_interrupt)
    result = charlm("train", "--text", text, "--run", "r", "--steps", 50, *SMALL)
    assert result.exit_code == 130
    assert "interrupted at step 3 of 50" in result.output
    (record,) = records("r")
    assert record["step"] == 3 and set(record) == KEYS
    assert not Path("r/sample.txt").exists()
    assert succeed("sample", "r", "--length", 5).startswith("The")


def test_second_interrupt_interrupts_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.asked
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_divergence_is_named(text: Path) -> None:
    message = fail("train", "--text", text, "--run", "r", "--lr", 1e38, "--steps", 20, *SMALL)
    assert "smaller --lr than 1e+38" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "absent.txt"], "cannot read the text absent.txt: No such file or directory"),
        (["--text", "."], "cannot read the text .: Is a directory"),
        (["--text", "latin1.txt"], "latin1.txt is not UTF-8 at byte 3"),
        (["--text", "empty.txt"], "has 0 characters"),
        (["--text", "short.txt", "--batch-size", 32],
         "has 1,801 characters, too few for one batch, which takes 32 x 64 + 1 = 2,049"),
        (["--prompt", "caf\xe9"], "the prompt has the character 'é' at position 3, which"),
        (["--epochs", 2, "--steps", 3], "give one of epochs and steps, not both"),
        (["--lr", "nan"], "lr must be positive, got nan"),
        (["--batch-size", 0], "batch-size must be positive, got 0"),
        (["--dropout", 1], "dropout must be at least 0 and below 1, got 1.0"),
        (["--seed", 2**32], "seed must be at least 0 and below 2**32"),
        (["--threads", -1], "threads must be positive, got -1"),
        (["--cell", "nas"], "'nas' is not one of"),
        (["--preset", "absent"], "'absent' is not one of"),
        (["--device", "absent"], "cannot use device 'absent'"),
        (["--device", "meta"], "cannot use device 'meta'"),
        (["--preset", "frankenstein"], "set CHARLM_DATA to a folder that holds frankenstein.txt"),
        (["--preset", "frankenstein", "--text", "short.txt"],
         "has 2,001 characters, but this preset takes characters 1380 to 8230"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_arguments(arguments: list[object], message: str) -> None:
    Path("latin1.txt").write_bytes("caf\xe9".encode("latin-1") * 1000)
    Path("empty.txt").touch()
    Path("short.txt").write_text("a" * 2001)
    assert message in " ".join(fail("train", "--run", "r", *arguments).split())
    assert not Path("r").exists()


def test_runs_are_never_overwritten(text: Path) -> None:
    occupied = Path("occupied")
    occupied.mkdir()
    (occupied / "precious.txt").write_text("precious")
    message = fail("train", "--text", text, "--run", occupied, "--steps", 1, *SMALL)
    assert "occupied exists and isn't an empty folder: choose another --run folder" in message
    assert [path.name for path in occupied.iterdir()] == ["precious.txt"]
    Path("empty").mkdir()
    succeed("train", "--text", text, "--run", "empty", "--steps", 1, *SMALL)


def test_a_place_that_takes_no_folder(text: Path) -> None:
    message = fail("train", "--text", text, "--run", "text.txt/r", "--steps", 1, *SMALL)
    assert "cannot make the run folder text.txt/r: Not a directory" in message


def synthetic_letter(seed: int) -> str:
    """A text of the recipe's shape: a mark, 60 distinct characters from 1380 to 8230."""
    prompt = str(read_preset("frankenstein")[0].prompt)
    others = [chr(code) for code in range(33, 127) if chr(code) not in prompt + "Letter 1"]
    alphabet = sorted({*prompt, *"Letter 1"})
    alphabet += others[: 60 - len(alphabet)]
    order = torch.randint(60, (6850 - 60 - 8,), generator=torch.Generator().manual_seed(seed))
    letter = "Letter 1" + "".join(alphabet) + "".join(alphabet[index] for index in order)
    return "\ufeff" + "\xe6" * 1379 + letter + "\xe6" * 500


def test_frankenstein_counts(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("texts").mkdir()
    Path("texts/frankenstein.txt").write_text(synthetic_letter(seed), encoding="utf-8")
    monkeypatch.setenv("CHARLM_DATA", "texts")
    output = succeed("train", "--preset", "frankenstein", "--epochs", 1, "--run", "r")
    facts = dict(line.split(maxsplit=1) for line in output.splitlines()[:6])
    assert facts == {
        "text": "frankenstein.txt, characters 1380..8230", "ids": "6,850", "vocabulary": "60",
        "samples": "6,802", "batches": "189", "parameters": "64,764",
    }  # fmt: skip
    assert "note:" not in output
    (record,) = records("r")
    assert (record["epoch"], record["step"], record["lr"]) == (1, 189, 0.015)
    assert record["tokens_seen"] == 6802 * 48 and "val_loss" not in record
    assert f"Epoch 1/1, Loss: {record['train_loss']:.4f} (" in output
    assert Path("r/sample.txt").read_text().startswith("You will rejoice to hear")


def test_frankenstein_loss_is_the_mean_over_characters_of_the_documents_model(seed: int) -> None:
    """One epoch beside the document's own loop: nn.LSTM, zero states, nothing else."""
    config = read_preset("frankenstein")[0].override(
        {"cell": "lstm", "epochs": 1, "batch_size": 300}
    )
    Path("f.txt").write_text(synthetic_letter(seed), encoding="utf-8")
    trainer = Trainer(config, read_corpus(Text(["f.txt"]), characters=(1380, 8230)).ids, 60)
    torch.manual_seed(config.seed)
    embedding = torch.nn.Embedding(60, 48)
    lstm = torch.nn.LSTM(48, 96, batch_first=True)
    linear = torch.nn.Linear(96, 60)
    parameters = [*embedding.parameters(), *lstm.parameters(), *linear.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.015)
    losses, sizes = [], []
    for features, labels in trainer.batches.epoch(0):
        optimizer.zero_grad()
        zeros = torch.zeros(1, len(features), 96)
        output, _ = lstm(embedding(features), (zeros, zeros))
        logits = linear(output).view(-1, 60)
        loss = torch.nn.CrossEntropyLoss()(logits, labels.reshape(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        sizes.append(len(features))
    assert sizes == [300] * 22 + [202]
    (record,) = trainer.train()
    # The document's own mean lets the short last batch weigh as much as a full one.
    mean = sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)
    assert record.train_loss == pytest.approx(mean, abs=1e-5)


def test_another_edition_is_pointed_out(seed: int) -> None:
    Path("f.txt").write_text(synthetic_letter(seed)[1:], encoding="utf-8")  # as utf-8-sig reads it
    output = succeed("train", "--preset", "frankenstein", "--text", "f.txt", "--steps", 1)
    assert "the recipe's with 'Letter 1': figures won't compare" in output
    assert Path("runs/frankenstein-1/model.safetensors").is_file()


@pytest.mark.parametrize("cell", ["fused", "lstm"])
def test_frankenstein_on_the_real_text(
    cell: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    folders = [Path(REAL_TEXTS)] if REAL_TEXTS else []
    found = [path for path in [*folders, ROOT.parent / "shared" / "data"]
             if (path / "frankenstein.txt").is_file()]  # fmt: skip
    if not found:
        pytest.skip("no frankenstein.txt: CHARLM_DATA names no folder that holds it")
    monkeypatch.setenv("CHARLM_DATA", str(found[0]))
    output = succeed("train", "--preset", "frankenstein", "--epochs", 1, "--run", "r",
                     "--cell", cell)  # fmt: skip
    assert "note:" not in output
    (record,) = records("r")
    assert 1.6 < record["train_loss"] < 1.8


REAL_TEXTS = os.environ.get("CHARLM_DATA")  # before the fixture hides it


def test_reading_keeps_the_mark_and_normalises_line_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    data = "\ufeffa\r\nb\rc\n".encode()
    Path("t.txt").write_bytes(data)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    for source in ("t.txt", "-"):
        corpus = read_corpus(Text([source]))
        assert corpus.vocabulary.decode(corpus.ids) == "\ufeffa\nb\nc\n"
