"""Dynamic evaluation: `charlm eval --dynamic` and the rule behind it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from charlm import dynamic
from charlm.batches import rows_for_evaluation
from charlm.cli import main
from charlm.corpus import builtin_text
from charlm.dynamic import Following, evaluate_following
from charlm.evaluation import evaluate
from charlm.model import CharacterModel
from click.testing import CliRunner
from torch.nn import functional


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_and_rows() -> tuple[CharacterModel, list]:
    model = CharacterModel(9, embedding=5, hidden=17, layers=2, dropout=0.5, cell="fused")
    train, held = torch.randint(9, (400,)).numpy(), torch.randint(9, (101,)).numpy()
    return model, [rows_for_evaluation(train, 7, 3), rows_for_evaluation(held, 11, 1)]


def test_the_rule() -> None:
    """The papers', written out once more, over all weights as one vector."""
    model, (training, rows) = model_and_rows()
    following = Following(rate=1e-2, decay=0.3, batches=5)
    found = evaluate_following(model, training, rows, following)
    assert model.training, "the mode was changed"

    model.eval()
    parameters = model.learned()

    def gradient(batch: tuple, states: tuple) -> tuple:
        logits, after = model(batch[0], states)
        loss = functional.cross_entropy(logits, batch[1].flatten())
        gradients = torch.autograd.grad(loss, parameters)
        vector = torch.cat([g.flatten() for g in gradients]).double()
        return loss.item(), vector, tuple(s.detach() for s in after)

    squares, states = torch.zeros(()), model.zero_states(3)
    for _, batch in zip(range(5), training.epoch(0), strict=False):
        _, g, states = gradient(batch, states)
        squares = squares + g**2 / 5
    s = squares.sqrt()
    pull = (0.3 * s / s.mean()).clamp(max=1)
    first = w = torch.cat([p.detach().flatten() for p in parameters]).double()
    total, states = 0.0, model.zero_states(1)
    for batch in rows.epoch(0):
        loss, g, states = gradient(batch, states)
        total += loss * batch[1].numel()
        w = w + pull * (first - w) - 1e-2 * g / (s + 2e-3)
        torch.nn.utils.vector_to_parameters(w.float(), parameters)
    assert found == pytest.approx(total / 100, rel=1e-5)
    assert found != pytest.approx(evaluate(model, rows), rel=1e-3)


@pytest.mark.parametrize("ends", ["well", "interrupted"])
def test_the_weights_come_back(ends: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (training, rows) = model_and_rows()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    static = evaluate(model, rows)
    if ends == "well":
        evaluate_following(model, training, rows, Following(rate=0.1))
    else:
        gradients, calls = dynamic._gradients, iter([True] * 5)  # two of the training text

        def interrupted(*arguments: object) -> object:
            if not next(calls, False):
                raise KeyboardInterrupt
            return gradients(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(dynamic, "_gradients", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate_following(model, training, rows, Following(rate=0.1, batches=2))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert evaluate(model, rows) == static and model.training


def test_a_rate_of_0_is_the_static_loss() -> None:
    model, (training, rows) = model_and_rows()
    found = evaluate_following(model, training, rows, Following(rate=0.0))
    assert found == pytest.approx(evaluate(model, rows), rel=1e-6)


def charlm(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_eval_dynamic() -> None:
    """A text of other words is learned on the way, and only on the way."""
    Path("text.txt").write_text(builtin_text()[:9_000], encoding="utf-8")
    charlm("train", "--text", "text.txt", "--run", "r", "--hidden", 33, "--window", 17,
           "--batch-size", 9, "--embedding", 5, "--steps", 60, "--validation", 0.1)  # fmt: skip
    Path("other.txt").write_text("the heath that he hates " * 99, encoding="utf-8")
    weights = Path("r/model.safetensors").read_bytes()
    for options in (["--split", "validation"], ["--split", "all", "--text", "other.txt"]):
        output = charlm("eval", "r", "--dynamic", *options)
        rows = dict(re.split(r" {2,}", line) for line in output.splitlines())
        assert list(rows)[-2:] == ["dynamic loss", "dynamic bits per character"]
        if "all" in options:
            assert float(rows["dynamic loss"]) < 0.8 * float(rows["loss"])
        assert Path("r/model.safetensors").read_bytes() == weights
    assert "choose one" in charlm("eval", "r", "--dynamic", "--weights", "int8", code=1)
