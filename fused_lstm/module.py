"""`FusedLSTM`, the module."""

from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .functional import Call, Refusal, States, compute, prepare
from .lookup import look_up
from .stream import Stream

Kind = TypeVar("Kind", bound=nn.Module)
Embedding = nn.Module | Tensor | None
_Torch: Any = nn.LSTM  # its methods, for a FusedLSTM to borrow


class FusedLSTM(nn.RNNBase):
    """A multi-layer long short-term memory network: `torch.nn.LSTM`, computed by fused kernels.

    Takes and returns what `torch.nn.LSTM` does, with the same parameters under the same names, the
    same initialisation, and the same errors; state dicts go both ways. It derives from
    `torch.nn.RNNBase` and not from `torch.nn.LSTM`, which TorchDynamo does not compile.

    Args:
        input_size: I, the features of one step of the input.
        hidden_size: H, the cells.
        num_layers: L, stacked layers.
        bias: whether there are the biases b_ih and b_hh.
        batch_first: whether input and output are (B, T, ...) and not (T, B, ...).
        dropout: probability of zeroing an element of each layer's output but the last's, in
            training.
        bidirectional: D = 2 directions, the second from the last step to the first; else D = 1.
        proj_size: P, the size of a projection of the hidden state, less than H; 0: none, P = H.
        device, dtype: of the parameters.

    Inputs:
        input: (T, B, I), (B, T, I) with `batch_first`, (T, I), or a `PackedSequence`, in the dtype
            of the parameters: float32, float64, bfloat16, float16.
        hx: (h_0, c_0) of shapes (L*D, B, P) and (L*D, B, H), without B where the input has none;
            zeros if not given.
        embedding: by name only. With it, an `nn.Embedding` of I features or a tensor (V, I), the
            input is int64 ids without I, (T, B), (B, T), (T,) or a `PackedSequence` of them, and
            `lstm(ids, hx, embedding=embedding)` is `lstm(embedding(ids), hx)`; the identity makes
            them one-hot. On a CPU, with up to 1,024 rows and twice as many ids (in 16 bits and
            under autocast eight times), the input's products are then taken once for each row of
            the embedding, not for each of the input: a layer of H 96 and I 48 takes a third fewer
            multiplications.

    Under autocast the products are computed in the autocast dtype and the results have the dtypes
    that `torch.nn.LSTM` gives on this processor; where it fails there with "could not create a
    primitive descriptor" (on a CPU without AVX-512, say), all results are in the autocast dtype.
    On a GPU everything is in the dtype that `torch.nn.LSTM` gives, which for bfloat16 is float16
    where cuDNN serves it (torch 2.11). For bfloat16 itself, call a module of that dtype, with
    `torch.autocast("cuda", enabled=False)`.

    Returns:
        output, (h_n, c_n): output (T, B, D*P), (B, T, D*P), (T, D*P) or a `PackedSequence`; the
        states shaped as those of `hx`.

    Raises:
        TypeError, ValueError, RuntimeError: as `torch.nn.LSTM` raises them, in its words.
    """

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    # nn.LSTM's own argument checks, for whoever overrides or calls them, and for its errors below.
    get_expected_cell_size = _Torch.get_expected_cell_size
    check_forward_args = _Torch.check_forward_args
    permute_hidden = _Torch.permute_hidden

    def flatten_parameters(self) -> None:
        """Does nothing: these kernels take the parameters as they are."""

    @overload
    def forward(
        self, input: Tensor, hx: States | None = None, *, embedding: Embedding = None
    ) -> tuple[Tensor, States]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: States | None = None, *, embedding: Embedding = None
    ) -> tuple[PackedSequence, States]: ...

    def forward(
        self, input: Any, hx: States | None = None, *, embedding: Embedding = None
    ) -> tuple[Any, States]:
        ids = None
        if embedding is not None:
            input, ids = look_up(input, embedding)
        packed = isinstance(input, PackedSequence)
        data: Any = input
        batch_sizes, states = None, hx
        if packed:
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if hx is not None:
                states = self.permute_hidden(hx, sorted_indices)
        try:
            call = self._prepare(data, batch_sizes, states)
        except Refusal:
            call = None
        if call is None:  # out here, or its error would be shown as one on top of ours
            if ids is not None:
                data = ids.rows()
                input = PackedSequence(data, *input[1:]) if packed else data
            return _Torch.forward(self, input, hx)
        if ids is not None:
            ids.give(call)
        output, h_n, c_n = compute(call)
        if packed:
            rows = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return rows, self.permute_hidden((h_n, c_n), unsorted_indices)
        return output, (h_n, c_n)

    def _prepare(self, input: Tensor, batch_sizes: Tensor | None, hx: States | None) -> Call:
        """`prepare` with what the module has."""
        # By name on every call: a parametrization, weight_norm, pruning, functional_call or an
        # assignment may have put another tensor there. The dict first: it is ten times as fast.
        parameters = self._parameters
        weights: list[Any] = []
        for name in self._flat_weights_names:
            weight = parameters.get(name)
            if weight is None:
                weight = getattr(self, name)
                if weight is None:
                    raise Refusal(f"{name} is None")
            weights.append(weight)
        return prepare(input, batch_sizes, hx, weights, self)

    def stream(
        self,
        batch_size: int = 1,
        *,
        dtype: torch.dtype | None = None,
        weights: torch.dtype | None = None,
    ) -> Stream:
        """The module one step at a time: `fused_lstm.stream.Stream`, which says what these are."""
        return Stream(self, batch_size, dtype=dtype, weights=weights)

    def __prepare_scriptable__(self) -> nn.LSTM:
        # TorchScript compiles nn.LSTM; it can't compile what this class does.
        return self.to_torch()

    @classmethod
    def from_torch(cls, module: nn.LSTM) -> "FusedLSTM":
        """A FusedLSTM with the same parameters (the same objects), hooks and flags as `module`."""
        return _rebuilt(module, cls)

    def to_torch(self) -> nn.LSTM:
        """A `torch.nn.LSTM` with the same parameters (the same objects), hooks and flags."""
        return _rebuilt(self, nn.LSTM)


def _rebuilt(module: nn.Module, cls: type[Kind]) -> Kind:
    """`module` as another class: its own containers, the same parameters and hooks in them."""
    result = cls.__new__(cls)
    result.__dict__.update(
        (name, value.copy() if isinstance(value, (dict, list)) else value)
        for name, value in module.__dict__.items()
    )
    return result
