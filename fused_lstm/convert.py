"""`torch.nn.LSTM` to `FusedLSTM` and back, inside a model."""

from typing import TypeVar

from torch import nn

from .module import FusedLSTM

Model = TypeVar("Model", bound=nn.Module)


def replace_lstm(model: Model) -> Model:
    """Turns every `torch.nn.LSTM` in `model`, itself included, into a `FusedLSTM`, in place.

    The module objects stay the same and change their class, so that parameters, hooks, training
    flags, shared modules and references held elsewhere (an optimizer's, a list's) stay what they
    are. Subclasses of `torch.nn.LSTM`, among them quantizable and parametrized ones, are left as
    they are: what they override is theirs. Replace first and parametrize afterwards.

    Returns:
        model
    """
    return _change_class(model, nn.LSTM, FusedLSTM)


def restore_lstm(model: Model) -> Model:
    """Turns every `FusedLSTM` in `model`, itself included, into a `torch.nn.LSTM`, in place.

    The opposite of `replace_lstm`, with the same rules.

    Returns:
        model
    """
    return _change_class(model, FusedLSTM, nn.LSTM)


def _change_class(model: Model, old: type[nn.Module], new: type[nn.Module]) -> Model:
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new
    return model
