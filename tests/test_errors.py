"""Bad arguments: the same type and message as nn.LSTM's, or nn.LSTM's own result, never a crash."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, randn
from torch.nn import Parameter
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fused_lstm import FusedLSTM, backend

Case = Callable[[type], Any]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def cases(**functions: Case) -> None:
    CASES.update(functions)


def states(*shape: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return randn(*shape, **kwargs), randn(*shape, **kwargs)


def packed(**fields: Any) -> PackedSequence:
    """A packed batch of lengths 5, 3, 1 with some of its fields replaced by wrong ones."""
    right = pack_sequence([randn(length, 4) for length in (5, 3, 1)])
    return PackedSequence.__new__(
        PackedSequence, *[fields.get(name, getattr(right, name)) for name in right._fields]
    )


def assigned(lstm: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(lstm, name, value)
    return lstm


# The constructor.
cases(
    no_arguments=lambda cls: cls(),
    one_argument=lambda cls: cls(4),
    unknown_argument=lambda cls: cls(4, 3, nonlinearity="relu"),
    too_many_arguments=lambda cls: cls(4, 3, 1, True, False, 0.0, False, 0, None, None, None),
    input_size_0=lambda cls: cls(0, 3),
    input_size_negative=lambda cls: cls(-1, 3),
    input_size_float=lambda cls: cls(4.0, 3),
    input_size_none=lambda cls: cls(None, 3),
    hidden_size_0=lambda cls: cls(4, 0),
    hidden_size_float=lambda cls: cls(4, 3.0),
    hidden_size_str=lambda cls: cls(4, "3"),
    num_layers_0=lambda cls: cls(4, 3, 0),
    num_layers_negative=lambda cls: cls(4, 3, -1),
    num_layers_float=lambda cls: cls(4, 3, 1.5),
    bias_int=lambda cls: cls(4, 3, bias=1),
    bias_none=lambda cls: cls(4, 3, bias=None),
    batch_first_int=lambda cls: cls(4, 3, batch_first=1),
    dropout_negative=lambda cls: cls(4, 3, 2, dropout=-0.1),
    dropout_above_1=lambda cls: cls(4, 3, 2, dropout=1.1),
    dropout_bool=lambda cls: cls(4, 3, 2, dropout=True),
    dropout_str=lambda cls: cls(4, 3, 2, dropout="half"),
    dropout_nan=lambda cls: cls(4, 3, 2, dropout=float("nan")),
    proj_size_negative=lambda cls: cls(4, 3, proj_size=-1),
    proj_size_as_hidden=lambda cls: cls(4, 3, proj_size=3),
    proj_size_float=lambda cls: cls(4, 3, proj_size=1.5),
    dtype_integer=lambda cls: cls(4, 3, dtype=torch.int8),
    dtype_str=lambda cls: cls(4, 3, dtype="float32"),
    device_unknown=lambda cls: cls(4, 3, device="nowhere"),
)

# The input.
cases(
    input_0d=lambda cls: cls(4, 3)(randn(())),
    input_1d=lambda cls: cls(4, 3)(randn(4)),
    input_4d=lambda cls: cls(4, 3)(randn(4, 4, 4, 4)),
    input_features=lambda cls: cls(4, 3)(randn(5, 2, 7)),
    input_features_2d=lambda cls: cls(4, 3)(randn(5, 7)),
    input_features_batch_first=lambda cls: cls(4, 3, batch_first=True)(randn(5, 2, 7)),
    input_features_empty=lambda cls: cls(4, 3)(randn(5, 2, 0)),
    input_list=lambda cls: cls(4, 3)([[1.0]]),
    input_none=lambda cls: cls(4, 3)(None),
    input_float=lambda cls: cls(4, 3)(1.0),
    input_integer=lambda cls: cls(4, 3)(torch.ones(5, 2, 4, dtype=torch.int64)),
    input_bool=lambda cls: cls(4, 3)(torch.ones(5, 2, 4, dtype=torch.bool)),
    input_double=lambda cls: cls(4, 3)(randn(5, 2, 4).double()),
    input_bfloat16=lambda cls: cls(4, 3)(randn(5, 2, 4).bfloat16()),
    input_float_to_double=lambda cls: cls(4, 3).double()(randn(5, 2, 4)),
    input_complex=lambda cls: cls(4, 3)(randn(5, 2, 4, dtype=torch.complex64)),
    input_float8=lambda cls: cls(4, 3).to(torch.float8_e4m3fn)(
        randn(5, 2, 4).to(torch.float8_e4m3fn)
    ),
    input_sparse=lambda cls: cls(4, 3)(randn(5, 2, 4).to_sparse()),
    input_meta=lambda cls: cls(4, 3)(randn(5, 2, 4, device="meta")),
    weights_meta=lambda cls: cls(4, 3, device="meta")(randn(5, 2, 4)),
    weights_meta_double=lambda cls: cls(4, 3, device="meta").double()(randn(5, 2, 4).double()),
    no_steps=lambda cls: cls(4, 3)(randn(0, 2, 4)),
    no_steps_batch_first=lambda cls: cls(4, 3, batch_first=True)(randn(2, 0, 4)),
    no_steps_2d=lambda cls: cls(4, 3)(randn(0, 4)),
    no_steps_no_sequences=lambda cls: cls(4, 3)(randn(0, 0, 4)),
    no_steps_bidirectional=lambda cls: cls(4, 3, bidirectional=True)(randn(0, 2, 4)),
    no_steps_projected=lambda cls: cls(4, 3, proj_size=2)(randn(0, 2, 4), None),
    no_steps_double=lambda cls: cls(4, 3).double()(randn(0, 2, 4).double()),
    nothing=lambda cls: cls(4, 3)(),
    three_arguments=lambda cls: cls(4, 3)(randn(5, 2, 4), None, None),
)

# The states.
X = (5, 2, 4)
cases(
    hx_3d_for_2d=lambda cls: cls(4, 3)(randn(5, 4), states(1, 1, 3)),
    hx_2d_for_3d=lambda cls: cls(4, 3)(randn(X), states(1, 3)),
    hx_mixed_dims=lambda cls: cls(4, 3)(randn(X), (randn(1, 2, 3), randn(1, 3))),
    hx_batch=lambda cls: cls(4, 3)(randn(X), states(1, 3, 3)),
    hx_batch_first=lambda cls: cls(4, 3, batch_first=True)(randn(2, 5, 4), states(1, 5, 3)),
    hx_layers=lambda cls: cls(4, 3)(randn(X), states(2, 2, 3)),
    hx_directions=lambda cls: cls(4, 3, 2, bidirectional=True)(randn(X), states(2, 2, 3)),
    hx_layers_2d=lambda cls: cls(4, 3)(randn(5, 4), states(2, 3)),
    hx_hidden=lambda cls: cls(4, 3)(randn(X), states(1, 2, 4)),
    cx_hidden=lambda cls: cls(4, 3)(randn(X), (randn(1, 2, 3), randn(1, 2, 4))),
    hx_unprojected=lambda cls: cls(4, 3, proj_size=2)(randn(X), states(1, 2, 3)),
    cx_projected=lambda cls: cls(4, 3, proj_size=2)(randn(X), states(1, 2, 2)),
    hx_double=lambda cls: cls(4, 3)(randn(X), states(1, 2, 3, dtype=torch.float64)),
    cx_double=lambda cls: cls(4, 3)(randn(X), (randn(1, 2, 3), randn(1, 2, 3).double())),
    hx_float_for_double=lambda cls: cls(4, 3).double()(randn(X).double(), states(1, 2, 3)),
    hx_bfloat16=lambda cls: cls(4, 3)(randn(X), states(1, 2, 3, dtype=torch.bfloat16)),
    hx_integer=lambda cls: cls(4, 3)(randn(X), (torch.ones(1, 2, 3).int(),) * 2),
    hx_meta=lambda cls: cls(4, 3)(randn(X), states(1, 2, 3, device="meta")),
    hx_tensor=lambda cls: cls(4, 3)(randn(X), randn(1, 2, 3)),
    hx_tensor_of_two=lambda cls: cls(4, 3)(randn(X), randn(2, 1, 2, 3)),
    hx_empty=lambda cls: cls(4, 3)(randn(X), ()),
    hx_one=lambda cls: cls(4, 3)(randn(X), (randn(1, 2, 3),)),
    hx_three=lambda cls: cls(4, 3)(randn(X), (randn(1, 2, 3),) * 3),
    hx_none=lambda cls: cls(4, 3)(randn(X), (None, None)),
    cx_none=lambda cls: cls(4, 3)(randn(X), (randn(1, 2, 3), None)),
    hx_numbers=lambda cls: cls(4, 3)(randn(X), (0.0, 0.0)),
    hx_nested=lambda cls: cls(4, 3)(randn(X), (states(1, 2, 3), states(1, 2, 3))),
    hx_dict=lambda cls: cls(4, 3)(randn(X), {"h": randn(1, 2, 3), "c": randn(1, 2, 3)}),
    hx_sparse=lambda cls: cls(4, 3)(randn(X), tuple(s.to_sparse() for s in states(1, 2, 3))),
)

# Packed sequences, some of which nn.LSTM takes.
cases(
    packed_too_many_rows=lambda cls: cls(4, 3)(packed(batch_sizes=torch.tensor([3, 2, 2]))),
    packed_too_few_rows=lambda cls: cls(4, 3)(packed(batch_sizes=torch.tensor([3, 2, 2, 1, 1, 1]))),
    packed_increasing=lambda cls: cls(4, 3)(packed(batch_sizes=torch.tensor([1, 2, 3, 3]))),
    packed_not_monotonic=lambda cls: cls(4, 3)(packed(batch_sizes=torch.tensor([3, 1, 3, 2]))),
    packed_not_monotonic_bidirectional=lambda cls: cls(4, 3, bidirectional=True)(
        packed(batch_sizes=torch.tensor([3, 1, 3, 2]))
    ),
    packed_trailing_zero=lambda cls: cls(4, 3, bidirectional=True)(
        packed(batch_sizes=torch.tensor([3, 3, 3, 0]))
    ),
    packed_negative=lambda cls: cls(4, 3)(packed(batch_sizes=torch.tensor([3, 3, 3, -1]))),
    packed_negative_first=lambda cls: cls(4, 3)(packed(batch_sizes=torch.tensor([-3, 3, 3, 3]))),
    packed_no_steps=lambda cls: cls(4, 3)(packed(batch_sizes=torch.tensor([], dtype=torch.int64))),
    packed_int32=lambda cls: cls(4, 3)(packed(batch_sizes=torch.tensor([3, 2, 2, 1, 1]).int())),
    packed_float=lambda cls: cls(4, 3)(packed(batch_sizes=torch.tensor([3.0, 2, 2, 1, 1]))),
    packed_sizes_2d=lambda cls: cls(4, 3)(packed(batch_sizes=torch.tensor([[3, 2, 2, 1, 1]]))),
    packed_sizes_0d=lambda cls: cls(4, 3)(packed(batch_sizes=torch.tensor(9))),
    packed_data_3d=lambda cls: cls(4, 3)(packed(data=randn(9, 1, 4))),
    packed_data_1d=lambda cls: cls(4, 3)(packed(data=randn(9))),
    packed_features=lambda cls: cls(4, 3)(packed(data=randn(9, 5))),
    packed_double=lambda cls: cls(4, 3)(packed(data=randn(9, 4).double())),
    packed_integer=lambda cls: cls(4, 3)(packed(data=torch.ones(9, 4).long())),
    packed_hx_batch=lambda cls: cls(4, 3)(packed(), states(1, 2, 3)),
    packed_hx_layers=lambda cls: cls(4, 3)(packed(), states(2, 3, 3)),
    packed_cx_hidden=lambda cls: cls(4, 3)(packed(), (randn(1, 3, 3), randn(1, 3, 2))),
    packed_hx_2d=lambda cls: cls(4, 3)(packed(), states(3, 3)),
    packed_hx_tensor=lambda cls: cls(4, 3)(packed(), randn(1, 3, 3)),
    packed_hx_one=lambda cls: cls(4, 3)(packed(sorted_indices=torch.arange(3)), (randn(1, 3, 3),)),
    packed_hx_double=lambda cls: cls(4, 3)(packed(), states(1, 3, 3, dtype=torch.float64)),
    packed_bad_index=lambda cls: cls(4, 3)(
        packed(sorted_indices=torch.tensor([0, 1, 9])), states(1, 3, 3)
    ),
    packed_few_indices=lambda cls: cls(4, 3)(
        packed(sorted_indices=torch.tensor([0, 1])), states(1, 3, 3)
    ),
    packed_bad_unsorted_index=lambda cls: cls(4, 3)(
        packed(unsorted_indices=torch.tensor([0, 1, 9])), states(1, 3, 3)
    ),
)

# The module's own attributes.
cases(
    weights_mixed=lambda cls: assigned(cls(4, 3), weight_hh_l0=Parameter(randn(12, 3).double()))(
        randn(X)
    ),
    weights_mixed_double=lambda cls: assigned(
        cls(4, 3).double(), weight_hh_l0=Parameter(randn(12, 3))
    )(randn(X).double()),
    bias_meta=lambda cls: assigned(cls(4, 3), bias_hh_l0=Parameter(randn(12, device="meta")))(
        randn(X)
    ),
    weight_none=lambda cls: assigned(cls(4, 3), weight_hh_l0=None)(randn(X)),
    weight_plain_tensor=lambda cls: assigned(cls(4, 3), weight_hh_l0=randn(12, 3))(randn(X)),
    dropout_too_large=lambda cls: assigned(cls(4, 3, 2), dropout=1.5)(randn(X)),
    more_layers=lambda cls: assigned(cls(4, 3, 2), num_layers=3)(randn(X)),
    fewer_layers=lambda cls: assigned(cls(4, 3, 2), num_layers=1)(randn(X)),
    state_dict_shape=lambda cls: cls(4, 3).load_state_dict(cls(4, 5).state_dict()),
    state_dict_missing=lambda cls: cls(4, 3, 2).load_state_dict(cls(4, 3).state_dict()),
    state_dict_unexpected=lambda cls: cls(4, 3).load_state_dict(cls(4, 3, 2).state_dict()),
)


# The gradients.
@case
def weight_changed_in_place(cls: type) -> None:
    lstm = cls(4, 3)
    output, _ = lstm(randn(X))
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
    output.sum().backward()


@case
def backward_twice(cls: type) -> None:
    output, _ = cls(4, 3)(randn(X))
    output.sum().backward()
    output.sum().backward()


def outcome(run: Case, cls: type) -> tuple[str, Any]:
    """("ValueError", message), or ("returned", the value), of one case."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "returned", run(cls)
    except Exception as error:
        return type(error).__name__, str(error).replace(cls.__name__, "LSTM")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("forced", [None, "reference"])
def test_same_as_torch(forced: str | None, name: str) -> None:
    expected = outcome(CASES[name], nn.LSTM)
    with backend(forced) if forced else contextlib.nullcontext():
        found = outcome(CASES[name], FusedLSTM)
    if name == "weight_changed_in_place":  # the message names the shape of what a kernel has saved
        expected, found = ((kind, message[:80]) for kind, message in (expected, found))
    if expected[0] == "returned":
        assert found[0] == "returned", found
        torch.testing.assert_close(found[1], expected[1])
    else:
        assert found == expected


def test_cases_are_errors() -> None:
    """nn.LSTM takes few of the cases, so that the comparison is one of errors."""
    taken = {name for name, run in CASES.items() if outcome(run, nn.LSTM)[0] == "returned"}
    assert taken == {"packed_too_many_rows", "packed_trailing_zero", "fewer_layers"}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("weight_ih_l0", (12, 5)),
        ("weight_hh_l0", (12, 5)),
        ("weight_hh_l0", (8, 3)),
        ("bias_ih_l0", (1,)),
        ("bias_hh_l0_reverse", (7,)),
        ("weight_ih_l1_reverse", (12, 3)),
        ("weight_ih_l0_reverse", (12, 4, 1)),
    ],
)
def test_weights_of_a_wrong_shape(name: str, shape: tuple[int, ...]) -> None:
    """nn.LSTM reads past their end, so the message is FusedLSTM's own."""
    lstm = FusedLSTM(4, 3, 2, bidirectional=True)
    right = tuple(getattr(lstm, name).shape)
    setattr(lstm, name, Parameter(randn(shape)))
    with pytest.raises(RuntimeError) as error:
        lstm(randn(X))
    assert str(error.value) == f"{name} must have the shape {right}, got {shape}"


def test_wrong_projection_shape() -> None:
    lstm = FusedLSTM(4, 3, proj_size=2)
    lstm.weight_hr_l0 = Parameter(randn(1, 3))
    with pytest.raises(RuntimeError, match=r"weight_hr_l0 must have the shape \(2, 3\), got"):
        lstm(randn(X))


def test_warning_for_dropout_in_one_layer() -> None:
    def warned(cls: type) -> str:
        with pytest.warns(UserWarning) as record:
            cls(4, 3, dropout=0.5)
        return str(record[0].message)

    assert warned(FusedLSTM) == warned(nn.LSTM)


def test_list_of_states() -> None:
    """nn.LSTM takes a list for the tuple (h_0, c_0)."""
    lstm = FusedLSTM(4, 3)
    x, hx = randn(X), states(1, 2, 3)
    torch.testing.assert_close(lstm(x, list(hx)), lstm(x, hx), rtol=0, atol=0)


def test_backward_operator_checks_what_it_reads() -> None:
    """Called directly with tensors of other shapes, it must say so and not read past their end."""
    x, h, c = torch.randn(3, 2, 5), torch.zeros(1, 2, 7), torch.zeros(1, 2, 7)
    weights = [torch.randn(28, 5), torch.randn(28, 7)]
    output, _, _, gates, cells = torch.ops.fused_lstm.lstm_forward(x, None, h, c, weights)
    right = {
        "grad_output": torch.ones_like(output),
        "grad_h_n": torch.ones_like(h),
        "grad_c_n": torch.ones_like(c),
        "output": output,
        "gates": gates,
        "cells": cells,
    }

    def call(grad_output, grad_h_n, grad_c_n, output, gates, cells):
        grads = (grad_output, grad_h_n, grad_c_n)
        saved = (output, gates, cells)
        return torch.ops.fused_lstm.lstm_backward(
            *grads, x, None, h, c, weights, *saved, [True] * 5
        )

    call(**right)
    for name, tensor in right.items():
        for wrong in (tensor[..., :-1], tensor.double()):
            with pytest.raises(RuntimeError, match=name):
                call(**{**right, name: wrong})
