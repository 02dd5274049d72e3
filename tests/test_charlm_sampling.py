"""charlm sample: what is drawn, from which prompt, and what is refused."""

import fcntl
import math
import os
import pty
import select
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from charlm.cli import main
from charlm.corpus import builtin_text
from charlm.errors import CharlmError
from charlm.model import CharacterModel
from charlm.sampling import Writer, sample
from charlm.vocabulary import Vocabulary
from click.testing import CliRunner

VOCABULARY = Vocabulary(" abcdefghijklmnop")


@pytest.fixture
def model(seed: int) -> CharacterModel:
    model = CharacterModel(17, embedding=5, hidden=33, layers=2, dropout=0.5, cell="fused")
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, and depending on the state
            parameter.mul_(6)
    return model


def greedy(model: CharacterModel, prompt: str, length: int) -> str:
    """The likeliest continuation by whole forward passes from zero states, one a character."""
    model.eval()
    text = prompt
    with torch.no_grad():
        for _ in range(length):
            logits, _ = model(VOCABULARY.encode(text)[None], model.zero_states(1))
            text += VOCABULARY.decode([int(logits[-1].argmax())])
    return text


def test_temperature_zero_is_the_likeliest_after_the_whole_prompt(model: CharacterModel) -> None:
    expected = greedy(model, "face deed", 40)
    model.train()
    assert sample(model, VOCABULARY, "face deed", 40, temperature=0) == expected
    assert model.training, "the mode was changed"
    # Only the last character of these prompts is the same.
    other = sample(model, VOCABULARY, "mild", 40, temperature=0)
    assert other[len("mild"):] != expected[len("face deed"):]  # fmt: skip


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-300}, {"top_k": 1, "top_p": 1.0}]
)
def test_options_that_leave_only_the_likeliest(model: CharacterModel, options: dict) -> None:
    expected = sample(model, VOCABULARY, "abc", 60, temperature=0)
    assert sample(model, VOCABULARY, "abc", 60, seed=7, **options) == expected


@pytest.mark.parametrize("options", [{"top_k": 17}, {"top_k": 1000}, {"top_p": 1.0}])
def test_options_that_leave_everything(model: CharacterModel, options: dict) -> None:
    expected = sample(model, VOCABULARY, "abc", 60, seed=7)
    assert sample(model, VOCABULARY, "abc", 60, seed=7, **options) == expected


def test_a_seed_decides_the_text(model: CharacterModel) -> None:
    texts = [sample(model, VOCABULARY, "abc", 60, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(len(text) == 63 and text.startswith("abc") for text in texts)
    assert sample(model, VOCABULARY, "abc", 0) == "abc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        ({"temperature": math.nan}, "temperature must be at least 0, got nan"),
        ({"top_k": 0}, "top-k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top-p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.5}, "top-p must be above 0 and at most 1, got 1.5"),
        ({"top_p": math.nan}, "top-p must be above 0"),
        ({"length": -1}, "length must be at least 0, got -1"),
        ({"prompt": ""}, "the prompt is empty"),
        (
            {"prompt": "abz"},
            "the prompt has the character 'z' at position 2, which is",
        ),
    ],
)
def test_bad_arguments(model: CharacterModel, options: dict, message: str) -> None:
    with pytest.raises(CharlmError, match=message):
        sample(model, VOCABULARY, **({"prompt": "abc", "length": 1} | options))


def test_diverged_model(model: CharacterModel) -> None:
    with torch.no_grad():
        model.linear.bias.fill_(math.nan)
    with pytest.raises(CharlmError, match="has diverged"):
        sample(model, VOCABULARY, "abc", 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("charlm")
    (folder / "text.txt").write_text(builtin_text()[:12_000], encoding="utf-8")
    arguments = ["train", "--text", str(folder / "text.txt"), "--run", str(folder / "run"),
                 "--steps", "60", "--hidden", "32", "--window", "16", "--seed", "4",
                 "--prompt", "assert "]  # fmt: skip
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return folder / "run"


def charlm_sample(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["sample", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_command_repeats_the_runs_own_sample(run: Path) -> None:
    text = (run / "sample.txt").read_text(encoding="utf-8")
    assert text.startswith("assert ") and len(text) == 507
    assert charlm_sample(run) == charlm_sample(run, "--device", "auto") == text + "\n"


def test_command_passes_its_options_on(run: Path) -> None:
    options = ["--prompt", "The ", "--length", 50]
    likeliest = charlm_sample(run, *options, "--temperature", 0)
    assert likeliest.startswith("The ") and len(likeliest) == 55
    for more in (["--top-k", 1], ["--top-p", 1e-9]):
        assert charlm_sample(run, *options, "--seed", 9, *more) == likeliest
    a, b, c = (charlm_sample(run, *options, "--seed", seed) for seed in (1, 1, 2))
    assert a == b and len({a, c, likeliest}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--prompt", "\u2603"],
            "the prompt has the character '\u2603' at position 0, which",
        ),
        (["--top-p", "2"], "top-p must be above 0 and at most 1, got 2.0"),
        (["--temperature", "-0.5"], "temperature must be at least 0, got -0.5"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--device", "absent"], "cannot use device 'absent'"),
    ],
)
def test_command_refuses(run: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["sample", str(run), *arguments])
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert message in result.output


def drawn(writer: Writer, *arguments: object) -> list[str]:
    return ["".join(of) for of in zip(*writer.write(*arguments), strict=True)]


@pytest.mark.parametrize("cell", ["fused", "lstm", "gru"])
def test_texts_side_by_side_and_one_after_the_other(cell: str, seed: int) -> None:
    model = CharacterModel(17, embedding=0, hidden=9, layers=1, dropout=0.5, cell=cell).eval()
    writer = Writer(model, VOCABULARY, 3, seed=seed)
    assert [len(text) for text in next(writer.write("abc", 70))] == [32] * 3
    texts = drawn(writer, "abc", 70)
    assert len(set(texts)) == 3 and {len(text) for text in texts} == {70}

    # All that was drawn has gone in, and what is typed after it.
    writer = Writer(model, VOCABULARY, temperature=0)
    (first,), (second,) = drawn(writer, "abc", 40), drawn(writer, "dab", 40)
    assert second == sample(model, VOCABULARY, f"abc{first}dab", 40, temperature=0)[46:]


@pytest.mark.parametrize("texts", [1, 3])
def test_a_text_ends_behind_stop(model: CharacterModel, texts: int) -> None:
    whole = drawn(Writer(model, VOCABULARY, texts, temperature=3), "a", 90)
    stop = whole[0][40:43]
    found = drawn(Writer(model, VOCABULARY, texts, temperature=3), "a", 90, stop)
    assert found == ["".join(text.partition(stop)[:2]) for text in whole]


def test_characters_of_several_bytes_come_whole() -> None:
    vocabulary = Vocabulary(bytes(range(256)).decode("latin-1"), "bytes")
    decode = vocabulary.decoder()
    assert [decode([byte], False) for byte in "\u2603!".encode()] == ["", "", "\u2603", "!"]
    assert decode([0xE2], True) == vocabulary.decode([0xE2]) == "\ufffd"


def test_command_on_something_else(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["sample", str(tmp_path)])
    assert result.exit_code == 1
    assert "has no config.json: give the folder of a charlm run" in result.output


def test_command_draws_several_and_says_how_fast(run: Path) -> None:
    options = ["--samples", 3, "--length", 40, "--weights", "int8", "--stats", "--prompt", "The "]
    result = CliRunner().invoke(main, ["sample", str(run), *map(str, options)])
    assert result.exit_code == 0, result.output
    parts = result.stdout.split(" of 3 ---\n")
    assert len(parts) == 4 and all(part.startswith("The ") for part in parts[1:])
    assert "120 characters in " in result.stderr and "characters a second" in result.stderr


def test_command_reads_a_prompt_and_stops(run: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("def \n", encoding="utf-8", newline="")
    text = charlm_sample(run, "--prompt", f"FILE:{tmp_path}/prompt.txt", "--stop", "e")
    assert text.startswith("def \n") and text[5:].find("e") == len(text) - 7
    result = CliRunner().invoke(main, ["sample", str(run), "--prompt", f"FILE:{tmp_path}/no"])
    assert result.exit_code == 1 and "cannot read the prompt" in result.output


@pytest.mark.skipif(os.name != "posix", reason="there are no pseudo-terminals")
def test_interactive_on_a_terminal(run: Path) -> None:
    command = [sys.executable, "-m", "charlm", "sample", str(run), "--interactive", "--stats"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*command, "--length", "100000000"], stdin=theirs, stdout=theirs, stderr=theirs, cwd=run,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    shown = b""

    def wait_for(text: bytes, key: bytes = b"") -> None:
        nonlocal shown
        while text not in shown:
            if select.select([ours], [], [], 2)[0]:
                shown += os.read(ours, 65536)
            else:
                os.write(ours, key)
        shown = shown.partition(text)[2]

    wait_for(b"all.\r\n> ")
    os.write(ours, "\u2603\n".encode())
    wait_for(b"which is not among the")
    wait_for(b"\r\n> ")
    for typed in (b"The \n", b"\n"):
        os.write(ours, typed)
        while len(shown) < 500:  # the text goes on
            shown += os.read(ours, 65536)
        os.write(ours, b"\x03")
        wait_for(b" characters a second\r\n> ")
    # Not a text, but a line is given up; for good only once it is being read: between that and
    # showing the prompt, Python's input() heeds no Ctrl-C until a line has come.
    os.write(ours, b"of\x03")
    wait_for(b"\r\n> ", b"\x03")
    os.write(ours, b"\x04")
    assert process.wait(60) == 0
    os.close(ours)


def test_eval_with_narrower_weights(run: Path) -> None:
    def loss(*options: str) -> float:
        result = CliRunner().invoke(main, ["eval", str(run), "--split", "train", *options])
        assert result.exit_code == 0, result.output
        return float(next(line.split()[-1] for line in result.output.splitlines()
                          if line.startswith("bits per")))  # fmt: skip

    exact = loss()
    assert abs(loss("--weights", "bf16") - exact) < 0.002
    assert abs(loss("--weights", "int8") - exact) < 0.01
