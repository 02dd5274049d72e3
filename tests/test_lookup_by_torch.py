"""Ids and an embedding where torch looks up the rows; what `explain` says of them, and errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_lstm import FusedLSTM, backend, explain, lookup

V = 11


def scaled(embedding: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(embedding)


OTHERWISE: dict[str, Callable[[], Any]] = {
    "padding_idx": lambda: nn.Embedding(V, 3, padding_idx=2),
    "max_norm": lambda: nn.Embedding(V, 3, max_norm=0.5),
    "scale_grad_by_freq": lambda: nn.Embedding(V, 3, scale_grad_by_freq=True),
    "another module": lambda: nn.Sequential(nn.Embedding(V, 3), nn.Tanh()),
    "parametrized": lambda: scaled(nn.Embedding(V, 3)),
    "many rows": lambda: nn.Embedding(lookup.MOST_ROWS + 1, 3),
    "few ids": lambda: nn.Embedding(100, 3),
}


@pytest.mark.parametrize("why", OTHERWISE)
def test_the_rows_where_there_is_more_to_do(why: str, looked_up: list[bool]) -> None:
    embedding = OTHERWISE[why]()
    other = copy.deepcopy(embedding)
    lstm = FusedLSTM(3, 17)
    ids = torch.randint(V, (7, 5))
    gradients = []
    for found in (lstm(ids, embedding=embedding), lstm(other(ids))):
        lstm.zero_grad()
        found[0].pow(2).sum().backward()
        gradients.append([p.grad.clone() for p in lstm.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    for one, two in zip(embedding.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=0)
    assert looked_up == [False]


def test_hooks_of_the_embedding_run() -> None:
    embedding, seen = nn.Embedding(V, 3), []
    embedding.register_forward_hook(lambda module, args, result: seen.append(result.shape))
    FusedLSTM(3, 17)(torch.randint(V, (7, 5)), embedding=embedding)
    assert seen == [(7, 5, 3)]


def test_few_ids_in_sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    embedding = nn.Embedding(V, 3)
    for steps in (7, 8):
        _, found = lookup.look_up(torch.randint(V, (steps, V)), embedding)
        assert found is not None
        with torch.autocast("cpu", torch.bfloat16):
            _, found = lookup.look_up(torch.randint(V, (steps, V)), embedding)
        assert (found is not None) == (steps == 8)


def test_forced_backend(looked_up: list[bool]) -> None:
    lstm, embedding = FusedLSTM(3, 17), nn.Embedding(V, 3)
    ids = torch.randint(V, (7, 5))
    expected = lstm(ids, embedding=embedding)
    with backend("reference"):
        found = lstm(ids, embedding=embedding)
    torch.testing.assert_close(found, expected)
    assert looked_up == [True, False]


# --- what explain says of it ----------------------------------------------------------------------


def test_explain() -> None:
    lstm, embedding = FusedLSTM(3, 17).requires_grad_(False), nn.Embedding(V, 3)
    ids = torch.randint(V, (7, 5))
    told = explain(lstm, ids, embedding=embedding)
    assert told.input == "ids: W_ih multiplies the embedding"
    assert told.sizes == "T 7, B 5, I 3, H 17, layers 1, directions 1"
    assert told.backward.startswith("kernels of ")  # for the embedding
    assert "input        ids: W_ih" in str(told)
    with torch.autocast("cpu", torch.bfloat16):
        told = explain(lstm, ids, embedding=embedding)
    assert told.backend == "cpu" and told.dtype is torch.bfloat16
    assert "input" not in str(explain(lstm, embedding(ids)))
    assert explain(lstm, ids[None, None], embedding=embedding).backend == "torch.nn.LSTM"
    with backend("cuda"):
        told = explain(lstm, ids, embedding=embedding)
        with pytest.raises(RuntimeError) as raised:
            lstm(ids, embedding=embedding)
    assert told.backend is None and told.reason == str(raised.value)


REASONS: dict[str, Callable[[], tuple[Tensor, Any]]] = {
    "the embedding does more than look up rows": lambda: (
        torch.randint(V, (7, 5)),
        nn.Embedding(V, 3, padding_idx=2),
    ),
    "the ids are not int64 on the CPU": lambda: (
        torch.randint(V, (7, 5), dtype=torch.int32),
        nn.Embedding(V, 3),
    ),
    "the embedding has more than 1024 rows, or none": lambda: (
        torch.randint(V, (999, 5)),
        nn.Embedding(1025, 3),
    ),
    "there are fewer than 2 ids for each row of the embedding": lambda: (
        torch.randint(V, (7, 3)),
        nn.Embedding(V, 3),
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_explain_says_why_not(reason: str) -> None:
    ids, embedding = REASONS[reason]()
    told = explain(FusedLSTM(3, 17), ids, embedding=embedding)
    assert told.input == f"rows of the embedding: {reason}" and told.backend == "cpu"


def test_explain_of_another_backend() -> None:
    with backend("reference"):
        told = explain(FusedLSTM(3, 17), torch.randint(V, (7, 5)), embedding=nn.Embedding(V, 3))
    assert told.input == "rows of the embedding: the CPU's kernels don't serve this call"


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("id", [-1, V])
@pytest.mark.parametrize("recorded", [False, True])
def test_ids_that_name_no_row(id: int, recorded: bool) -> None:
    lstm, embedding = FusedLSTM(3, 17), nn.Embedding(V, 3)
    ids = torch.randint(V, (7, 5))
    ids[6, 4] = id
    with torch.set_grad_enabled(recorded), pytest.raises(IndexError) as found:
        lstm(ids, embedding=embedding)
    with pytest.raises(IndexError) as expected:
        embedding(ids)
    assert str(found.value) == str(expected.value)


def test_errors_are_those_of_the_rows() -> None:
    lstm, embedding = FusedLSTM(3, 17), nn.Embedding(V, 3)
    ids = torch.randint(V, (7, 5))
    wrong = [(ids, (torch.zeros(1, 4, 17),) * 2), (ids[None, None], None), (ids[:0], None)]
    for ids, hx in wrong:
        with pytest.raises(Exception) as expected:  # noqa: PT011
            lstm(embedding(ids), hx)
        with pytest.raises(type(expected.value)) as found:
            lstm(ids, hx, embedding=embedding)
        assert str(found.value) == str(expected.value)
    with pytest.raises(RuntimeError, match="input.size"):
        lstm(ids, embedding=nn.Embedding(V, 4))


def test_what_the_operators_refuse() -> None:
    ids = torch.randint(V, (7, 5))
    weights = [p.detach() for p in FusedLSTM(V, 17).parameters()]
    state = torch.zeros(1, 5, 17)
    ops = torch.ops.fused_lstm
    with pytest.raises(RuntimeError, match="weight_ih is Half but with ids must be Float"):
        ops.lstm_inference(ids, None, state.half(), state.half(), [w.half() for w in weights])
    with pytest.raises(RuntimeError, match=r"\(T, B, I\), or ids \(T, B\)"):
        ops.lstm_inference(ids[0], None, state, state, weights)
    output, _, _, gates, cells = ops.lstm_forward(ids, None, state, state, weights)
    saved = (ids, None, state, state, weights, output, gates, cells)
    with pytest.raises(RuntimeError, match="ids have no gradient"):
        ops.lstm_backward(output, None, None, *saved, [True] * 7)
    with pytest.raises(IndexError):
        ops.lstm_backward(output, None, None, ids + V, *saved[1:], [False] * 3 + [True] * 4)
