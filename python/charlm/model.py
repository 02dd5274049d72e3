"""The model: characters in, a score for each possible next character out."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from charlm.errors import CharlmError

States = tuple[Tensor, ...]

CELLS = ("fused", "lstm")


def recurrent_class(cell: str) -> Callable[..., nn.Module]:
    """The module class of a cell: fused_lstm.FusedLSTM or torch.nn.LSTM.

    Both initialise the same parameters in the same order, so a seed gives both the same weights.

    Raises:
        CharlmError: fused_lstm can't be imported, or there is no such cell.
    """
    if cell == "lstm":
        return nn.LSTM
    if cell != "fused":
        raise CharlmError(f"no cell is called {cell!r}: choose one of {', '.join(CELLS)}")
    try:
        from fused_lstm import FusedLSTM
    except ImportError as error:
        raise CharlmError(
            f"cell 'fused' needs fused_lstm ({error}): reinstall it, or pass --cell lstm"
        ) from error
    return FusedLSTM


class CharacterModel(nn.Module):
    """Embedding, recurrent layers, dropout, linear layer.

    Args:
        vocabulary_size: V.
        embedding: E, the width of a character's embedding; 0 feeds its one-hot vector instead.
        hidden: H, units a layer.
        layers: recurrent layers.
        dropout: probability, between the layers and before the linear one.
        cell: "fused" or "lstm".
    """

    def __init__(
        self,
        vocabulary_size: int,
        *,
        embedding: int,
        hidden: int,
        layers: int,
        dropout: float,
        cell: str,
    ) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.hyperparameters: dict[str, Any] = {
            "embedding": embedding,
            "hidden": hidden,
            "layers": layers,
            "dropout": dropout,
            "cell": cell,
        }
        if embedding:
            self.embedding = nn.Embedding(vocabulary_size, embedding)
        self.recurrent = recurrent_class(cell)(
            input_size=embedding or vocabulary_size,
            hidden_size=hidden,
            num_layers=layers,
            batch_first=True,
            # nn.LSTM warns where it has no place between layers to apply it.
            dropout=dropout if layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden, vocabulary_size)

    def forward(self, ids: Tensor, states: States) -> tuple[Tensor, States]:
        """ids (B, T) int64 and states (h, c), each (layers, B, H) -> logits (B*T, V), states."""
        if self.hyperparameters["embedding"]:
            features = self.embedding(ids)  # (B, T, E)
        else:
            features = functional.one_hot(ids, self.vocabulary_size).to(self.linear.weight.dtype)
        output, states = self.recurrent(features, states)  # (B, T, H)
        return self.linear(self.dropout(output)).flatten(0, 1), states

    def zero_states(self, batch_size: int) -> States:
        """Zero (h, c), each (layers, batch_size, H), where the weights are."""
        layers, hidden = self.hyperparameters["layers"], self.hyperparameters["hidden"]
        zeros = self.linear.weight.new_zeros(layers, batch_size, hidden)
        return zeros, zeros

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def detach(states: States) -> States:
    """The same states cut from the graph that made them: backpropagation stops here."""
    return tuple(state.detach() for state in states)
