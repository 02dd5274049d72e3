"""charlm sample: what is drawn, from which prompt, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from charlm.cli import main
from charlm.corpus import builtin_text
from charlm.errors import CharlmError
from charlm.model import CharacterModel
from charlm.sampling import choose, sample
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
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [0.625, 0.375, 0, 0]),
        # 0.3 / 0.95 is what top-k leaves of the second; the two together exceed 0.84.
        ({"top_k": 3, "top_p": 0.84}, [0.625, 0.375, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({"temperature": 1e300}, [0.25] * 4),
    ],
    ids=str,
)
def test_probabilities(options: dict, expected: list[float], seed: int) -> None:
    order = [2, 0, 3, 1]  # not sorted: the ids must come back through the sorting
    logits = torch.empty(4)
    logits[order] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(seed)
    draws = 4000
    counts = [0] * 4
    for _ in range(draws):
        counts[choose(logits, generator, **options)] += 1
    for index, probability in zip(order, expected, strict=True):
        deviation = math.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[index] / draws - probability) <= 5 * deviation, (counts, seed)


def test_equal_scores_are_taken_in_order() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    assert choose(logits, generator, temperature=0) == 1
    assert {choose(logits, generator, top_k=1) for _ in range(20)} == {1}
    assert {choose(logits, generator, top_k=2) for _ in range(50)} == {1, 2}


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


def test_command_on_something_else(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["sample", str(tmp_path)])
    assert result.exit_code == 1
    assert "has no config.json: give the folder of a charlm run" in result.output
