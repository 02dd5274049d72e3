"""Weights in and out: state dicts, pickles, parametrizations, conversion to and from nn.LSTM."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

from fused_lstm import FusedLSTM, replace_lstm, restore_lstm

OPTIONS: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "proj_size": 3}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 2, 4)


def same(found: nn.Module, expected: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(found(x), expected(x), rtol=0, atol=0)


def close(found: nn.Module, expected: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(found(x), expected(x))


def test_state_dicts_both_ways(x: Tensor) -> None:
    stock, fused = nn.LSTM(4, 7, **OPTIONS), FusedLSTM(4, 7, **OPTIONS)
    assert fused.load_state_dict(stock.state_dict()) == ([], [])
    close(fused, stock, x)
    fused.reset_parameters()
    assert stock.load_state_dict(fused.state_dict()) == ([], [])
    close(fused, stock, x)
    other = FusedLSTM(4, 7, device="meta", **OPTIONS)
    other.load_state_dict(stock.state_dict(), assign=True)
    same(other, fused, x)


def test_file_with_weights_only(x: Tensor) -> None:
    lstm = FusedLSTM(4, 7, **OPTIONS)
    file = io.BytesIO()
    torch.save(lstm.state_dict(), file)
    file.seek(0)
    other = FusedLSTM(4, 7, **OPTIONS)
    other.load_state_dict(torch.load(file, weights_only=True))
    same(other, lstm, x)


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies(how: str, x: Tensor) -> None:
    lstm = FusedLSTM(4, 7, **OPTIONS).eval()
    lstm.weight_hh_l0.requires_grad_(False)
    if how == "pickle":
        copied = pickle.loads(pickle.dumps(lstm))
    elif how == "deepcopy":
        copied = copy.deepcopy(lstm)
    else:
        file = io.BytesIO()
        torch.save(lstm, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert type(copied) is FusedLSTM and not copied.training
    assert not copied.weight_hh_l0.requires_grad and copied.weight_ih_l0.requires_grad
    same(copied, lstm, x)
    with torch.no_grad():
        copied.weight_ih_l0.zero_()
    assert not torch.equal(copied(x)[0], lstm(x)[0])


def test_state_of_an_old_lstm(x: Tensor) -> None:
    """nn.LSTM was pickled without proj_size before torch 1.8, and without names before 0.2."""
    lstm = FusedLSTM(4, 7, 2)
    state = lstm.__getstate__()
    del state["proj_size"]
    state["_all_weights"] = [[None] * 4] * 2
    old = FusedLSTM.__new__(FusedLSTM)
    old.__setstate__(state)
    assert old.proj_size == 0
    same(old, lstm, x)


def test_meta_device(x: Tensor) -> None:
    lstm = FusedLSTM(4, 7, device="meta")
    assert all(parameter.is_meta for parameter in lstm.parameters())
    assert lstm(x.to("meta"))[0].shape == (5, 2, 7)
    lstm.to_empty(device="cpu")
    lstm.reset_parameters()
    close(lstm, lstm.to_torch(), x)


def test_functional_call(x: Tensor) -> None:
    lstm, other = FusedLSTM(4, 7), FusedLSTM(4, 7)
    before = lstm(x)
    found = functional_call(lstm, dict(other.named_parameters()), (x,))
    torch.testing.assert_close(found, other(x), rtol=0, atol=0)
    torch.testing.assert_close(lstm(x), before, rtol=0, atol=0)
    weights = {name: p.detach().clone().requires_grad_() for name, p in lstm.named_parameters()}
    functional_call(lstm, weights, (x,))[0].sum().backward()
    assert all(weight.grad is not None for weight in weights.values())
    assert all(parameter.grad is None for parameter in lstm.parameters())


def test_swapped_data(x: Tensor) -> None:
    lstm, other = FusedLSTM(4, 7), FusedLSTM(4, 7)
    lstm(x)
    for parameter, replacement in zip(lstm.parameters(), other.parameters(), strict=True):
        parameter.data = replacement.data
    same(lstm, other, x)
    lstm.weight_hh_l0 = nn.Parameter(torch.zeros(28, 7))
    close(lstm, lstm.to_torch(), x)
    assert not torch.equal(lstm(x)[0], other(x)[0])


REWEIGHTED: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": lambda module: parametrizations.weight_norm(module, "weight_hh_l0"),
    "old weight_norm": lambda module: torch.nn.utils.weight_norm(module, "weight_hh_l0"),
    "spectral_norm": lambda module: parametrizations.spectral_norm(module, "weight_ih_l0"),
    "orthogonal": lambda module: parametrizations.orthogonal(module, "weight_hh_l0"),
    "parametrization": lambda module: parametrize.register_parametrization(
        module, "bias_ih_l0", nn.Tanh()
    ),
    "pruning": lambda module: prune.l1_unstructured(module, "weight_hh_l0", amount=0.5),
}


@pytest.mark.parametrize("name", REWEIGHTED)
def test_reparametrized_weights(name: str, x: Tensor) -> None:
    """Outputs, and gradients of the parameters behind a weight, over several steps of training."""
    stock = nn.LSTM(4, 7)
    fused = FusedLSTM.from_torch(copy.deepcopy(stock))
    for module in (stock, fused):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            REWEIGHTED[name](module)
        optimizer = torch.optim.SGD(module.parameters(), 0.5)
        for _ in range(3):
            optimizer.zero_grad()
            # Cached: nn.LSTM asks for a weight several times a call, and spectral_norm takes a
            # step of its power iteration each time.
            with parametrize.cached():
                module(x)[0].square().sum().backward()
            optimizer.step()
    assert list(dict(fused.named_parameters())) == list(dict(stock.named_parameters()))
    for found, expected in zip(fused.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
        assert found.grad is not None and found.grad.abs().sum() > 0
    close(fused.eval(), stock.eval(), x)


class Model(nn.Module):
    """LSTMs at several depths, one of them twice, one a subclass."""

    def __init__(self) -> None:
        super().__init__()

        class Own(nn.LSTM):
            pass

        self.encoder = nn.LSTM(4, 7, batch_first=True)
        self.blocks = nn.ModuleList([nn.ModuleDict({"rnn": nn.LSTM(7, 7)}), nn.Linear(7, 7)])
        self.shared = self.encoder
        self.own = Own(7, 7)
        self.outside = [self.encoder]  # a reference that torch knows nothing of

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.encoder(x)
        x, _ = self.blocks[0]["rnn"](x)
        x, _ = self.own(self.blocks[1](x))
        return x


def test_replace_and_restore(x: Tensor) -> None:
    model = Model().eval()
    model.encoder.train()
    model.encoder.weight_hh_l0.requires_grad_(False)
    calls: list[str] = []
    model.encoder.register_forward_hook(lambda *_: calls.append("forward"))
    model.encoder.register_full_backward_hook(lambda *_: calls.append("backward"))
    expected = model(x)
    parameters = list(model.parameters())
    names = list(model.state_dict())

    assert replace_lstm(model) is model
    assert type(model.encoder) is FusedLSTM and type(model.blocks[0]["rnn"]) is FusedLSTM
    assert model.shared is model.encoder and model.outside[0] is model.encoder
    assert type(model.own).__name__ == "Own"
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == names
    assert model.encoder.training and not model.blocks[0]["rnn"].training
    assert not model.encoder.weight_hh_l0.requires_grad
    calls.clear()
    found = model(x)
    found.sum().backward()
    assert calls == ["forward", "backward"]
    torch.testing.assert_close(found, expected)

    assert restore_lstm(model) is model
    assert not any(isinstance(module, FusedLSTM) for module in model.modules())
    assert type(model.encoder) is nn.LSTM and type(model.blocks[0]["rnn"]) is nn.LSTM
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert replace_lstm(restore_lstm(replace_lstm(model))) is model


def test_replace_the_model_itself(x: Tensor) -> None:
    stock = nn.LSTM(4, 7)
    expected = stock(x)
    fused = replace_lstm(stock)
    assert type(fused) is FusedLSTM
    torch.testing.assert_close(fused(x), expected)
    assert type(restore_lstm(fused)) is nn.LSTM


def test_replace_leaves_the_rest() -> None:
    parametrized = parametrizations.weight_norm(nn.LSTM(4, 7), "weight_hh_l0")
    model = nn.Sequential(nn.GRU(4, 7), nn.RNN(4, 7), nn.LSTMCell(4, 7), parametrized)
    kinds = [type(module) for module in model]
    replace_lstm(model)
    assert [type(module) for module in model] == kinds


def test_optimizer_goes_on_after_replacement(x: Tensor) -> None:
    models = [nn.LSTM(4, 7), None]
    models[1] = copy.deepcopy(models[0])
    losses = []
    for index, model in enumerate(models):
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        for step in range(6):
            if index == 1 and step == 3:
                replace_lstm(model)
            optimizer.zero_grad()
            loss = model(x)[0].square().sum()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    assert losses[0] < 1


def test_from_and_to_torch(x: Tensor) -> None:
    stock = nn.LSTM(4, 7, 2, dropout=0.5).eval()
    stock.register_forward_hook(lambda module, args, result: None)
    fused = FusedLSTM.from_torch(stock)
    assert type(fused) is FusedLSTM and type(stock) is nn.LSTM
    assert all(a is b for a, b in zip(fused.parameters(), stock.parameters(), strict=True))
    assert not fused.training and fused.dropout == 0.5
    close(fused, stock, x)
    back = fused.to_torch()
    assert type(back) is nn.LSTM and back.weight_hh_l0 is stock.weight_hh_l0
    same(back, stock, x)
    # From here on each has its own hooks, parameters and flags.
    fused.train()
    fused.weight_hh_l0 = nn.Parameter(torch.zeros(28, 7))
    fused.register_forward_hook(lambda module, args, result: 1 / 0)
    same(back, stock, x)
    assert not stock.training


def test_from_torch_makes_the_subclass(x: Tensor) -> None:
    class Own(FusedLSTM):
        pass

    assert type(Own.from_torch(nn.LSTM(4, 7))) is Own
