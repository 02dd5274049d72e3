"""The fastest LSTM for PyTorch: a drop-in replacement for `torch.nn.LSTM`."""

from .backends import backend, backends
from .convert import replace_lstm, restore_lstm
from .explain import explain
from .module import FusedLSTM

__all__ = ["FusedLSTM", "backend", "backends", "explain", "replace_lstm", "restore_lstm"]
