"""The fastest LSTM for PyTorch: a drop-in replacement for `torch.nn.LSTM`."""

from .backends import backend, backends
from .convert import replace_lstm, restore_lstm
from .dropout import Dropout
from .explain import explain
from .generation import generate
from .module import FusedLSTM

__all__ = [
    "Dropout",
    "FusedLSTM",
    "backend",
    "backends",
    "explain",
    "generate",
    "replace_lstm",
    "restore_lstm",
]
