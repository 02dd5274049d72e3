"""charlm's texts, batches, evaluation, schedule and files."""

import json
import math
import pickle
from pathlib import Path

import charlm.files
import numpy as np
import pytest
import torch
from charlm.batches import Rows, Windows, rows_for_evaluation
from charlm.corpus import builtin_text, split
from charlm.errors import CharlmError
from charlm.evaluation import bits_per_character, evaluate, perplexity
from charlm.files import write_atomically
from charlm.model import CharacterModel
from charlm.optimisation import Place, Record, learning_rate
from charlm.presets import preset_names, read_preset
from charlm.runfolder import RunFolder
from charlm.settings import Config
from charlm.vocabulary import Vocabulary
from torch.nn import functional


def test_vocabulary_is_sorted_and_goes_both_ways() -> None:
    text = builtin_text()
    vocabulary = Vocabulary.of(text)
    assert list(vocabulary.characters) == sorted(set(text))
    ids = vocabulary.encode(text)
    assert ids.dtype == torch.int64 and vocabulary.decode(ids.tolist()) == text
    with pytest.raises(CharlmError, match="the text has the character '\u2603'"):
        vocabulary.encode("a\u2603")


def test_split_cuts_in_order() -> None:
    parts = split(np.arange(33), [0.1, 0.1])
    assert [len(part) for part in parts] == [27, 3, 3]
    assert np.array_equal(np.concatenate(parts), np.arange(33))


def test_rows_go_on_where_they_ended() -> None:
    ids = np.arange(3 * 17 * 4 + 3 * 5 + 2)  # 4 windows a row and a bit, and a bit more
    rows = Rows(ids, window=17, batch_size=3)
    batches = list(rows.epoch(0))
    assert len(rows) == len(batches) == 4 and rows.samples == 12
    features = torch.cat([features for features, _ in batches], dim=1)
    assert features.shape == (3, 68) and torch.equal(features.flatten(), torch.arange(204))
    assert all(torch.equal(labels, features + 1) for features, labels in batches)
    assert torch.equal(next(rows.epoch(5, first=2))[0], batches[2][0])
    partial = list(Rows(ids, window=17, batch_size=3, partial=True).epoch(0))
    assert [labels.size(1) for _, labels in partial] == [17, 17, 17, 17, 5]


@pytest.mark.parametrize("stride", [1, 3, 17])
def test_windows_show_each_sample_once_in_another_order(stride: int) -> None:
    ids = np.arange(129)
    windows = Windows(ids, window=17, batch_size=33, stride=stride, seed=1)
    assert windows.samples == (129 - 18) // stride + 1
    orders = []
    for epoch in (0, 1):
        batches = list(windows.epoch(epoch))
        assert len(batches) == len(windows) == math.ceil(windows.samples / 33)
        assert all(torch.equal(labels, features + 1) for features, labels in batches)
        assert all(features.size(1) == 17 for features, _ in batches)
        assert batches[-1][0].size(0) == (windows.samples - 1) % 33 + 1
        orders.append(torch.cat([features[:, 0] for features, _ in batches]).tolist())
        first = len(batches) - 1
        assert torch.equal(next(windows.epoch(epoch, first))[0], batches[first][0])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(0, 129 - 17, stride))
    neighbour = Windows(ids, window=17, batch_size=33, stride=stride, seed=2)
    assert torch.cat([f[:, 0] for f, _ in neighbour.epoch(0)]).tolist() not in orders


def test_too_short_texts() -> None:
    Windows(np.arange(18), window=17, batch_size=3, stride=1, seed=0)
    with pytest.raises(CharlmError, match="17 characters, too few for one window of 17"):
        Windows(np.arange(17), window=17, batch_size=3, stride=1, seed=0)
    Rows(np.arange(52), window=17, batch_size=3)
    with pytest.raises(CharlmError, match=r"takes 3 x 17 \+ 1 = 52"):
        Rows(np.arange(51), window=17, batch_size=3)
    assert rows_for_evaluation(np.arange(17), window=17, batch_size=3) is None
    assert rows_for_evaluation(np.arange(18), window=17, batch_size=3).samples == 1


def test_evaluation_weighs_every_character_alike_with_dropout_off() -> None:
    model = CharacterModel(9, embedding=0, hidden=17, layers=2, dropout=0.5, cell="fused")
    ids = torch.randint(9, (1 + 3 * 40,))
    batches = rows_for_evaluation(ids.numpy(), window=17, batch_size=3)
    loss = evaluate(model, batches)
    assert model.training, "the mode was changed"
    # The same in one pass: the states carried over three windows are those of one long one.
    model.eval()
    rows, labels = ids[:120].view(3, 40), ids[1:121].view(3, 40)
    with torch.no_grad():
        logits, _ = model(rows, model.zero_states(3))
    expected = functional.cross_entropy(logits, labels.flatten()).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert evaluate(model, batches) == loss and not model.training
    assert perplexity(math.log(9)) == pytest.approx(9) and perplexity(1e4) < math.inf
    assert bits_per_character(math.log(8)) == pytest.approx(3)


@pytest.mark.parametrize("embedding", [0, 5])
def test_model_shapes(embedding: int) -> None:
    model = CharacterModel(17, embedding=embedding, hidden=33, layers=3, dropout=0.1, cell="fused")
    logits, states = model(torch.randint(17, (3, 9)), model.zero_states(3))
    assert logits.shape == (27, 17) and logits.dtype == torch.float32
    assert [state.shape for state in states] == [(3, 3, 33)] * 2
    one = CharacterModel(60, embedding=48, hidden=96, layers=1, dropout=0.0, cell="fused")
    assert one.parameter_count() == 64_764


def test_learning_rate() -> None:
    cosine = Config(preset="", schedule="cosine", warmup=0.1, lr=2.0, steps=100)
    rates = [learning_rate(cosine, Place(step, 100, 0)) for step in range(100)]
    assert rates.index(max(rates)) == 10 and max(rates) == 2.0
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.001
    constant = Config(preset="", lr=2.0, steps=100)
    assert {learning_rate(constant, Place(step, 100, 0)) for step in range(100)} == {2.0}


def test_settings_go_through_json() -> None:
    for name in preset_names():
        config, description = read_preset(name)
        assert description
        assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    config = read_preset("default")[0]
    assert config.override({"epochs": 3}).steps is None
    assert config.override({"hidden": None}) == config
    with pytest.raises(CharlmError, match="batches must be one of rows, windows"):
        config.override({"batches": "absent"})


def test_files_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def crash(*_: object) -> None:
        raise OSError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(charlm.files.os, "replace", crash)
        with pytest.raises(CharlmError, match="crash"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_metrics_leave_out_what_is_not_there(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "default")
    folder.add_record(Record(1, 2, 3.0, None, 4, 0.1, 0.5))
    folder.add_record(Record(1, 4, 2.0, 2.5, 8, 0.1, 0.9))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("val_loss") for line in lines] == [None, 2.5]
    assert "val_loss" not in lines[0]


@pytest.fixture
def saved(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path / "run", "default")
    folder.write_config(read_preset("default")[0].override({"prompt": "\u2603"}), {"ids": 3})
    torch.manual_seed(1)
    model = CharacterModel(4, embedding=5, hidden=3, layers=1, dropout=0.1, cell="fused")
    folder.write_model(model, Vocabulary("\n a\u2603"))
    return folder


def test_model_and_settings_come_back(saved: RunFolder) -> None:
    model, vocabulary = saved.read_model()
    torch.manual_seed(1)
    same = CharacterModel(4, embedding=5, hidden=3, layers=1, dropout=0.1, cell="fused")
    assert vocabulary.characters == "\n a\u2603"
    assert model.hyperparameters == same.hyperparameters and not model.training
    for name, value in same.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert saved.read_config() == read_preset("default")[0].override({"prompt": "\u2603"})


class Explosive:
    def __reduce__(self) -> tuple:
        return pytest.fail, ("a file was unpickled",)


@pytest.mark.parametrize("content", [b"", b"not a model", pickle.dumps(Explosive())])
def test_damaged_files_are_named(saved: RunFolder, content: bytes) -> None:
    for name, read in (
        ("model.safetensors", saved.read_model),
        ("config.json", saved.read_config),
    ):
        (saved.path / name).write_bytes(content)
        with pytest.raises(CharlmError, match=f"{name} isn't"):
            read()


def test_models_of_others_are_named(saved: RunFolder) -> None:
    import safetensors.torch

    path = saved.path / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CharlmError, match="isn't a model that charlm saved"):
        saved.read_model()
    path.unlink()
    with pytest.raises(CharlmError, match="has no model.safetensors"):
        saved.read_model()
