"""The module as a module: construction, training flags, dropout, subclasses, replicas."""

from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch
from torch import Tensor, nn

import fused_lstm
from fused_lstm import FusedLSTM


def test_public_names() -> None:
    assert set(fused_lstm.__all__) == {
        "Dropout",
        "FusedLSTM",
        "backend",
        "backends",
        "explain",
        "generate",
        "replace_lstm",
        "restore_lstm",
    }


@pytest.mark.parametrize(
    "layers, bias, both, proj", itertools.product((1, 3), (0, 1), (0, 1), (0, 2))
)
def test_same_initialisation(layers: int, bias: int, both: int, proj: int) -> None:
    """Names, order, shapes, dtypes and, from one seed, values of the parameters; the repr."""
    options = {
        "num_layers": layers,
        "bias": bool(bias),
        "bidirectional": bool(both),
        "proj_size": proj,
        "dropout": 0.25 if layers > 1 else 0.0,
        "batch_first": True,
    }
    torch.manual_seed(1)
    stock = nn.LSTM(5, 7, dtype=torch.float64, **options)
    torch.manual_seed(1)
    fused = FusedLSTM(5, 7, dtype=torch.float64, **options)
    assert list(fused.state_dict()) == list(stock.state_dict())
    for found, expected in zip(fused.parameters(), stock.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert repr(fused) == repr(stock).replace("LSTM", "FusedLSTM")
    assert [[p.shape for p in layer] for layer in fused.all_weights] == [
        [p.shape for p in layer] for layer in stock.all_weights
    ]


def test_signature() -> None:
    """Calls by position and by name are those of nn.LSTM."""
    by_position = FusedLSTM(5, 7, 2, False, True, 0.5, True, 3, "cpu", torch.float64)
    assert (by_position.input_size, by_position.hidden_size, by_position.num_layers) == (5, 7, 2)
    assert not by_position.bias and by_position.batch_first and by_position.bidirectional
    assert by_position.dropout == 0.5 and by_position.proj_size == 3
    assert next(by_position.parameters()).dtype is torch.float64
    parameters = list(inspect.signature(FusedLSTM.forward).parameters)
    assert parameters == [*inspect.signature(nn.LSTM.forward).parameters, "embedding"]


@pytest.mark.parametrize("kind", ["3-D", "packed"])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_draws_as_torch(p: float, both: bool, kind: str) -> None:
    """From the same seed the same elements are dropped, in the same order of layers."""
    stock = nn.LSTM(5, 7, 3, dropout=p, bidirectional=both)
    fused = FusedLSTM.from_torch(stock)
    x: object = torch.randn(6, 4, 5)
    if kind == "packed":
        x = nn.utils.rnn.pack_sequence([torch.randn(n, 5) for n in (6, 3, 1)])
    found, expected = [], []
    for module, results in ((fused, found), (stock, expected)):
        torch.manual_seed(3)
        for _ in range(2):
            output, (h_n, c_n) = module(x)
            results.append((output if kind == "3-D" else output.data, h_n, c_n))
        results.append(torch.rand(()))  # and the generator is left in the same state
    torch.testing.assert_close(found, expected)


def test_no_dropout_in_evaluation() -> None:
    lstm = FusedLSTM(5, 7, 2, dropout=0.5).eval()
    x = torch.randn(6, 4, 5)
    assert torch.equal(lstm(x)[0], lstm(x)[0])
    assert not torch.equal(lstm.train()(x)[0], lstm(x)[0])


def test_subclass() -> None:
    class Normalised(FusedLSTM):
        def __init__(self, size: int) -> None:
            super().__init__(size, size, batch_first=True)
            self.norm = nn.LayerNorm(size)

        def forward(self, input: Tensor, hx: object = None) -> Tensor:
            output, _ = super().forward(self.norm(input), hx)
            return output + input

    module = Normalised(4)
    x = torch.randn(2, 3, 4)
    output, _ = module.to_torch()(module.norm(x))
    torch.testing.assert_close(module(x), output + x)
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_own_checks_can_be_called() -> None:
    """As some libraries do with an nn.LSTM."""
    lstm, stock = FusedLSTM(4, 3, 2), nn.LSTM(4, 3, 2)
    x = torch.randn(5, 2, 4)
    hx = (torch.randn(2, 2, 3), torch.randn(2, 2, 3))
    lstm.check_forward_args(x, hx, None)
    assert lstm.get_expected_hidden_size(x, None) == stock.get_expected_hidden_size(x, None)
    assert lstm.get_expected_cell_size(x, None) == stock.get_expected_cell_size(x, None)
    assert lstm.permute_hidden(hx, None) is hx
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        lstm.check_forward_args(x[:, :1], hx, None)
    lstm.flatten_parameters()


def test_reset_parameters() -> None:
    lstm = FusedLSTM(4, 3)
    before = lstm.weight_hh_l0.detach().clone()
    lstm.reset_parameters()
    assert not torch.equal(before, lstm.weight_hh_l0)
    assert lstm.weight_hh_l0.abs().max() <= 3**-0.5


def test_conversions_of_dtype_and_sharing() -> None:
    lstm = FusedLSTM(4, 3)
    assert lstm.bfloat16()(torch.randn(5, 2, 4).bfloat16())[0].dtype is torch.bfloat16
    assert lstm.double()(torch.randn(5, 2, 4).double())[0].dtype is torch.float64
    lstm.float().share_memory()
    assert lstm(torch.randn(5, 2, 4))[0].dtype is torch.float32


def test_replicas() -> None:
    """What nn.DataParallel runs on each device: a module whose weights are plain attributes."""
    lstm = FusedLSTM(4, 3)
    replica = lstm._replicate_for_data_parallel()
    for name, parameter in lstm.named_parameters():
        setattr(replica, name, parameter * 1)
    x = torch.randn(5, 2, 4)
    assert torch.equal(replica(x)[0], lstm(x)[0])


def test_hooks() -> None:
    lstm = FusedLSTM(4, 3)
    seen = []
    lstm.register_forward_pre_hook(lambda module, args: seen.append("before"))
    lstm.register_forward_hook(lambda module, args, result: seen.append("after"))
    lstm.register_full_backward_hook(lambda module, grads, of: seen.append("backward"))
    lstm(torch.randn(5, 2, 4, requires_grad=True))[0].sum().backward()
    assert seen == ["before", "after", "backward"]


def test_states_are_not_shared_between_calls() -> None:
    lstm = FusedLSTM(4, 3, 2)
    x = torch.randn(5, 2, 4)
    with torch.no_grad():
        first = lstm(x)[1]
        kept = [state.clone() for state in first]
        lstm(torch.randn(5, 2, 4), first)
        first[0].zero_()
        assert torch.equal(first[1], kept[1])
        assert torch.equal(lstm(x)[1][0], kept[0])


def test_one_step_at_a_time() -> None:
    """States carried from step to step give the results of the whole sequence."""
    for options in ({}, {"num_layers": 2, "proj_size": 2}, {"bias": False}):
        lstm = FusedLSTM(4, 3, **options)
        x = torch.randn(6, 2, 4)
        whole, states = lstm(x)
        hx, steps = None, []
        with torch.no_grad():
            for step in x:
                output, hx = lstm(step[None], hx)
                steps.append(output)
        torch.testing.assert_close(torch.cat(steps), whole)
        torch.testing.assert_close(hx, states)
