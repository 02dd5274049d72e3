"""Packed sequences: as nn.LSTM returns them, and each sequence as if it were alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

from fused_lstm import FusedLSTM, backend

LENGTHS = [(5, 3, 3, 1), (1, 1, 1), (4,), (1,), (2, 7, 1, 7, 3), (33, 1)]


def packed(lengths: tuple[int, ...], size: int = 3) -> tuple[PackedSequence, list[Tensor]]:
    sequences = [torch.randn(length, size) for length in lengths]
    return pack_sequence(sequences, enforce_sorted=False), sequences


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("chosen", ["cpu", "reference"])
def test_each_sequence_as_if_alone(lengths: tuple[int, ...], chosen: str) -> None:
    lstm = FusedLSTM(3, 5, 2, bidirectional=True, proj_size=2)
    input, sequences = packed(lengths)
    hx = (torch.randn(4, len(lengths), 2), torch.randn(4, len(lengths), 5))
    with backend(chosen):
        output, (h_n, c_n) = lstm(input, hx)
        padded, found = pad_packed_sequence(output)
        assert found.tolist() == list(lengths)
        for index, sequence in enumerate(sequences):
            alone, (h, c) = lstm(sequence, (hx[0][:, index], hx[1][:, index]))
            torch.testing.assert_close(padded[: len(sequence), index], alone)
            assert not padded[len(sequence) :, index].any()
            torch.testing.assert_close(h_n[:, index], h)
            torch.testing.assert_close(c_n[:, index], c)


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_same_form_as_torch(enforce_sorted: bool) -> None:
    """batch_sizes and indices come back as they went in; strides are nn.LSTM's."""
    lengths = (5, 3, 1) if enforce_sorted else (3, 5, 1)
    input = pack_sequence([torch.randn(n, 3) for n in lengths], enforce_sorted=enforce_sorted)
    stock = nn.LSTM(3, 4, batch_first=True)
    fused = FusedLSTM.from_torch(stock)
    output, states = fused(input)
    expected, expected_states = stock(input)
    assert isinstance(output, PackedSequence)
    assert output.batch_sizes is input.batch_sizes
    assert output.sorted_indices is input.sorted_indices
    assert output.unsorted_indices is input.unsorted_indices
    torch.testing.assert_close(output.data, expected.data)
    torch.testing.assert_close(states, expected_states)
    assert output.data.stride() == expected.data.stride()
    assert [s.stride() for s in states] == [s.stride() for s in expected_states]


def test_full_batch_is_the_padded_one() -> None:
    """All lengths equal: the same bits as without packing, also in reverse."""
    lstm = FusedLSTM(3, 17, bidirectional=True)
    x = torch.randn(6, 4, 3)
    output, (h_n, c_n) = lstm(pack_padded_sequence(x, torch.tensor([6] * 4)))
    expected, (h, c) = lstm(x)
    torch.testing.assert_close(output.data.view(6, 4, 34), expected)
    torch.testing.assert_close((h_n, c_n), (h, c))


def test_gradients_reach_the_padded_input() -> None:
    stock = nn.LSTM(3, 4, bidirectional=True)
    fused = FusedLSTM.from_torch(stock)
    x = torch.randn(5, 3, 3, requires_grad=True)
    lengths = torch.tensor([2, 5, 1])
    grads = []
    for module in (stock, fused):
        output, (h_n, _) = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
        padded, _ = pad_packed_sequence(output)
        loss = padded.square().sum() + h_n.sum()
        grads.append(torch.autograd.grad(loss, [x, *module.parameters()]))
    torch.testing.assert_close(*grads)
    assert not grads[1][0][2:, 0].any() and not grads[1][0][1:, 2].any()


def test_strided_rows() -> None:
    input, _ = packed((5, 3, 1))
    lstm = FusedLSTM(3, 4)
    wide = torch.randn(9, 7)
    wide[:, 1:4] = input.data
    strided = PackedSequence(wide[:, 1:4], *input[1:])
    assert not strided.data.is_contiguous()
    torch.testing.assert_close(lstm(strided)[0].data, lstm(input)[0].data, rtol=0, atol=0)


def test_chained() -> None:
    """The packed output of one goes into the next."""
    first, second = FusedLSTM(3, 4), FusedLSTM(4, 5)
    input, sequences = packed((2, 6, 1))
    output, _ = second(first(input)[0])
    padded, _ = pad_packed_sequence(output)
    torch.testing.assert_close(padded[:6, 1], second(first(sequences[1])[0])[0])
