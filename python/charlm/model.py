"""The model: characters in, a score for each possible next character out."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from charlm.errors import CharlmError

States = tuple[Tensor, ...]


def _fused(**arguments: Any) -> nn.RNNBase:
    try:
        from fused_lstm import FusedLSTM
    except ImportError as error:
        raise CharlmError(f"cell 'fused' needs fused_lstm ({error}): reinstall it") from error
    return FusedLSTM(**arguments)


# fused and lstm initialise the same parameters in the same order, so a seed gives both the same
# weights.
CELLS: dict[str, Callable[..., nn.RNNBase]] = {
    "fused": _fused,
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
}


def _dropout(cell: str, p: float) -> nn.Dropout:
    if cell != "fused":
        return nn.Dropout(p)
    from fused_lstm import Dropout  # draws its mask in a twentieth of the time

    return Dropout(p)


def _torch_weights(recurrent: nn.RNNBase) -> None:
    """U(±1/sqrt(H)), as the constructor has drawn them."""


def _xavier_weights(recurrent: nn.RNNBase) -> None:
    """Each gate's matrix Xavier-uniform, biases zero (document 004's RNN)."""
    with torch.no_grad():
        for name, parameter in recurrent.named_parameters():
            if name.startswith("bias"):
                parameter.zero_()
            else:
                for gate in parameter.split(recurrent.hidden_size):
                    nn.init.xavier_uniform_(gate)


INITIAL_WEIGHTS = {"torch": _torch_weights, "xavier": _xavier_weights}


class CharacterModel(nn.Module):
    """Embedding, recurrent layers, dropout, linear layer.

    Args:
        vocabulary_size: V.
        embedding: E, the width of a character's embedding; 0 feeds its one-hot vector instead.
        hidden: H, units a layer.
        layers: recurrent layers.
        dropout: probability, between the layers and before the linear one.
        cell: one of CELLS.
        biases: 2, torch's b_ih and b_hh, or 1: b_hh is zero and not a parameter that is learned.

    Raises:
        CharlmError: there is no such cell, or fused_lstm can't be imported.
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
        biases: int = 2,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise CharlmError(f"no cell is called {cell!r}: choose one of {', '.join(CELLS)}")
        self.vocabulary_size = vocabulary_size
        self.hyperparameters: dict[str, Any] = {
            "embedding": embedding,
            "hidden": hidden,
            "layers": layers,
            "dropout": dropout,
            "cell": cell,
            "biases": biases,
        }
        if embedding:
            self.embedding = nn.Embedding(vocabulary_size, embedding)
        self.recurrent = CELLS[cell](
            input_size=embedding or vocabulary_size,
            hidden_size=hidden,
            num_layers=layers,
            batch_first=True,
            # nn.LSTM warns where it has no place between layers to apply it.
            dropout=dropout if layers > 1 else 0.0,
        )
        if biases == 1:
            for name, parameter in self.recurrent.named_parameters():
                if name.startswith("bias_hh"):
                    nn.init.zeros_(parameter.requires_grad_(False))
        self.dropout = _dropout(cell, dropout)
        self.linear = nn.Linear(hidden, vocabulary_size)

    @classmethod
    def on_meta(
        cls, vocabulary_size: int, hyperparameters: Mapping[str, Any], most_layers: int
    ) -> "CharacterModel":
        """A model of any size, which takes no memory: for a file's claims to be compared with.

        Raises:
            ValueError: more layers than `most_layers`, each of which takes some memory after all.
            TypeError, RuntimeError, CharlmError: what the constructor refuses.
        """
        if hyperparameters["layers"] > most_layers:
            raise ValueError(f"it has no {hyperparameters['layers']} layers")
        with torch.device("meta"):
            return cls(vocabulary_size, **hyperparameters)

    def forward(
        self, ids: Tensor, states: States, labels: Tensor | None = None
    ) -> tuple[Tensor, States]:
        """ids (B, T) int64 and states as of `zero_states` -> logits (B*T, V), states.

        With labels (B, T) int64, their mean cross-entropy, 0-d, in the logits' place.
        """
        # A GRU's or an RNN's state is one tensor, not a pair.
        output, last = self._recur(ids, states if len(states) > 1 else states[0])
        states = last if isinstance(last, tuple) else (last,)
        # The output (B, T, H) is a view of (T, B, H), whose rows are dense in this order.
        logits = self.linear(self.dropout(output.transpose(0, 1)))
        if labels is None:
            return logits.transpose(0, 1).flatten(0, 1), states
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.t().flatten())
        return loss, states

    def _recur(self, ids: Tensor, hx: Any) -> tuple[Tensor, Any]:
        """Output (B, T, H) and last states of the recurrent layers."""
        if self.hyperparameters["cell"] != "fused":
            return self.recurrent(self.features(ids), hx)
        like = self.linear.weight
        embedding: Any = (
            self.embedding
            if self.hyperparameters["embedding"]
            else torch.eye(self.vocabulary_size, dtype=like.dtype, device=like.device)
        )
        return self.recurrent(ids, hx, embedding=embedding)

    def features(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> what goes into the recurrent layers, (B, T, E or V)."""
        if self.hyperparameters["embedding"]:
            return self.embedding(ids)
        return functional.one_hot(ids, self.vocabulary_size).to(self.linear.weight.dtype)

    def zero_states(self, batch_size: int) -> States:
        """Zero (h, c), or (h,) of a GRU or an RNN, each (layers, batch_size, H)."""
        layers, hidden = self.hyperparameters["layers"], self.hyperparameters["hidden"]
        like = self.linear.weight  # which may be one process's share
        zeros = torch.zeros(layers, batch_size, hidden, dtype=like.dtype, device=like.device)
        return (zeros, zeros) if self.hyperparameters["cell"] in ("fused", "lstm") else (zeros,)

    def learned(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.learned())


def detach(states: States) -> States:
    """The same states in float32, cut from the graph that made them: backpropagation stops here."""
    return tuple(state.detach().float() for state in states)
