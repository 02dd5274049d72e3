"""Dynamic evaluation: a model whose weights follow the text that it is evaluated on.

Krause, Kahembwe, Murray, Renals, "Dynamic Evaluation of Neural Sequence Models", ICML 2018, with
their RMS rule.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from charlm.batches import Batch, Batches
from charlm.model import CharacterModel, States, detach


@dataclass(frozen=True)
class Following:
    """How the weights follow.

    After each window w += decay r (w0 - w) - rate g / (sqrt(s) + epsilon), where g is the gradient
    of the window's mean loss, w0 the trained weight, s the mean of g^2 over batches of the training
    text, and r is sqrt(s) over its mean over all weights, at most 1 / decay.
    """

    rate: float = 3e-4
    decay: float = 1e-3
    window: int = 20  # characters
    batches: int = 300  # of the training text
    epsilon: float = 2e-3


def evaluate_following(
    model: CharacterModel, training: Batches, batches: Batches, following: Following
) -> float:
    """Mean cross-entropy in nats over every character of one pass, each window scored before the
    weights follow it. The model has its weights and its mode again at the end.

    Args:
        training: what s is of.
        batches: one row for a text in its order, short windows.
    """
    was_training = model.training
    model.eval()  # no dropout
    weights = model.learned()
    trained = [weight.detach().clone() for weight in weights]
    try:
        scales = _scales(model, training, following)
        total, count = 0.0, 0
        states: States | None = None
        for batch in batches.epoch(0):
            loss, states = _gradients(model, batch, states if batches.carried else None)
            total += loss.item() * batch[1].numel()
            count += batch[1].numel()
            with torch.no_grad():
                for weight, first, (step, pull) in zip(weights, trained, scales, strict=True):
                    assert weight.grad is not None
                    weight.add_(pull * (first - weight) - step * weight.grad)
        return total / count
    finally:
        with torch.no_grad():
            for weight, first in zip(weights, trained, strict=True):
                weight.copy_(first)
        model.zero_grad()
        model.train(was_training)


def _gradients(model: CharacterModel, batch: Batch, states: States | None) -> tuple[Tensor, States]:
    """The mean loss, whose gradients are in the parameters' .grad then, and the states."""
    device = model.linear.weight.device
    features, labels = batch[0].to(device), batch[1].to(device)
    loss, states = model(features, states or model.zero_states(len(features)), labels)
    model.zero_grad()
    loss.backward()
    return loss.detach(), detach(states)


def _scales(
    model: CharacterModel, training: Batches, following: Following
) -> list[tuple[Tensor, Tensor]]:
    """Of each weight what its gradient and its distance from where it was are multiplied by."""
    squares = [torch.zeros_like(weight) for weight in model.learned()]
    states: States | None = None
    count = 0
    for batch in itertools.islice(training.epoch(0), following.batches):
        _, states = _gradients(model, batch, states if training.carried else None)
        for square, weight in zip(squares, model.learned(), strict=True):
            assert weight.grad is not None
            square.addcmul_(weight.grad, weight.grad)
        count += 1
    roots = [(square / count).sqrt() for square in squares]
    mean = sum(root.sum() for root in roots) / sum(root.numel() for root in roots)
    return [
        (following.rate / (root + following.epsilon), (following.decay * root / mean).clamp(max=1))
        for root in roots
    ]
