"""Properties that hold for any sizes and options, on random ones (hypothesis)."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from parity import DTYPES, Options, arguments, call, check
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_lstm import FusedLSTM

common = settings(
    max_examples=40,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the seed of tests/conftest.py
)


@st.composite
def options(draw: Any, largest: int = 40) -> Options:
    H = draw(st.integers(1, largest))
    return Options(
        num_layers=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        proj_size=draw(st.integers(0, H - 1)),
        given_hx=draw(st.booleans()),
        kind=draw(st.sampled_from(["3-D", "2-D", "packed", "unsorted"])),
        I=draw(st.integers(1, largest)),
        H=H,
        T=draw(st.integers(1, 9)),
        B=draw(st.integers(1, 9)),
    )


seeds = st.integers(0, 2**32 - 1)
plain = options().map(lambda o: Options(**{**vars(o), "kind": "3-D", "batch_first": False}))


def seeded(seed: int) -> None:
    note(f"torch.manual_seed({seed})")
    torch.manual_seed(seed)


@common
@given(options(), st.sampled_from(DTYPES), seeds)
def test_parity(options: Options, dtype: torch.dtype, seed: int) -> None:
    seeded(seed)
    check(options, dtype)


@common
@given(plain, seeds)
def test_sequences_do_not_mix(options: Options, seed: int) -> None:
    """A sequence's results do not depend on the others of its batch, nor on their order."""
    seeded(seed)
    lstm = FusedLSTM.from_torch(options.lstm().double())
    args = arguments(options, torch.float64)
    order = torch.randperm(options.B)
    output, h_n, c_n = call(lstm, args)
    args.input = args.input[:, order]
    if args.hx is not None:
        args.hx = (args.hx[0][:, order], args.hx[1][:, order])
    for found, expected in zip(call(lstm, args), (output, h_n, c_n), strict=True):
        torch.testing.assert_close(found, expected[:, order])
    args.input[:, 1:] = float("nan")
    for found, expected in zip(call(lstm, args), (output, h_n, c_n), strict=True):
        torch.testing.assert_close(found[:, 0], expected[:, order[0]])


@common
@given(plain, st.integers(1, 8), seeds)
def test_cut_in_two(options: Options, cut: int, seed: int) -> None:
    """The states of the first part, given to the second, go on as the whole sequence does."""
    options = Options(**{**vars(options), "bidirectional": False, "T": options.T + cut})
    seeded(seed)
    lstm = FusedLSTM.from_torch(options.lstm().double())
    args = arguments(options, torch.float64)
    whole, states = lstm(args.input, args.hx)
    first, hx = lstm(args.input[:cut], args.hx)
    second, end = lstm(args.input[cut:], hx)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(end, states)


@common
@given(plain, seeds)
def test_reverse_direction_is_forward_on_the_reversed(options: Options, seed: int) -> None:
    seeded(seed)
    options = Options(**{**vars(options), "num_layers": 1, "bidirectional": True})
    both = FusedLSTM.from_torch(options.lstm().double())
    one = Options(**{**vars(options), "bidirectional": False}).lstm().double()
    one.load_state_dict(
        {
            name.removesuffix("_reverse"): weight
            for name, weight in both.state_dict().items()
            if name.endswith("_reverse")
        }
    )
    args = arguments(options, torch.float64)
    output, h_n, c_n = call(both, args)
    hx = None if args.hx is None else (args.hx[0][1:], args.hx[1][1:])
    expected, states = FusedLSTM.from_torch(one)(args.input.flip(0), hx)
    P = options.proj_size or options.H
    torch.testing.assert_close(output[..., P:], expected.flip(0))
    torch.testing.assert_close((h_n[1:], c_n[1:]), states)


@common
@given(options(), seeds)
def test_results_are_bounded_and_finite(options: Options, seed: int) -> None:
    """For any finite input: |h| <= 1 without projection, |c| <= |c_0| + T; gradients finite."""
    seeded(seed)
    options = Options(**{**vars(options), "num_layers": 1, "proj_size": 0})
    lstm = FusedLSTM.from_torch(options.lstm())
    args = arguments(options, torch.float32)
    args.input *= 1e4
    args.input.requires_grad_()
    output, h_n, c_n = call(lstm, args)
    (output.sum() + c_n.sum()).backward()
    assert output.abs().max() <= 1 and h_n.abs().max() <= 1
    start = 0.0 if args.hx is None else args.hx[1].abs().max().item()
    assert c_n.abs().max().item() <= (start + options.T) * (1 + 1e-5)
    assert all(p.grad.isfinite().all() for p in lstm.parameters())
    assert args.input.grad is not None and args.input.grad.isfinite().all()


@common
@given(plain, st.data(), seeds)
def test_not_a_number_stays_where_it_is(options: Options, data: Any, seed: int) -> None:
    """A NaN in one step of one sequence shows from there on in that sequence, and only there."""
    seeded(seed)
    options = Options(**{**vars(options), "bidirectional": False})
    lstm = FusedLSTM.from_torch(options.lstm())
    args = arguments(options, torch.float32)
    t = data.draw(st.integers(0, options.T - 1))
    b = data.draw(st.integers(0, options.B - 1))
    args.input[t, b, 0] = float("nan")
    output, h_n, c_n = call(lstm, args)
    wrong = output.isnan()
    assert wrong[t:, b].all() and wrong.sum() == wrong[t:, b].sum()
    assert h_n[:, b].isnan().all() and c_n[:, b].isnan().all()


@common
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans(), seeds)
def test_packed_is_each_alone(lengths: list[int], both: bool, seed: int) -> None:
    seeded(seed)
    lstm = FusedLSTM(3, 5, bidirectional=both, dtype=torch.float64)
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in lengths]
    packed = torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    output, (h_n, c_n) = lstm(packed)
    assert isinstance(output, PackedSequence)
    unpacked: list[Tensor] = torch.nn.utils.rnn.unpack_sequence(output)
    for index, sequence in enumerate(sequences):
        alone, states = lstm(sequence)
        torch.testing.assert_close(unpacked[index], alone)
        torch.testing.assert_close((h_n[:, index], c_n[:, index]), states)
