"""What a loss means, and the loss on held-out text."""

import itertools
import math

import torch
from torch.nn import functional

from charlm.batches import Batches
from charlm.model import CharacterModel


def perplexity(loss: float) -> float:
    """exp of a mean cross-entropy in nats: the number of equally likely next characters."""
    return math.exp(min(loss, 700.0))  # exp overflows a double at 709


def bits_per_character(loss: float) -> float:
    return loss / math.log(2)


@torch.no_grad()
def evaluate(model: CharacterModel, batches: Batches, limit: int = 0, epoch: int = 0) -> float:
    """Mean cross-entropy in nats over every character of one pass, dropout off.

    The model is left in the mode in which it came.

    Args:
        limit: take the first `limit` batches only; 0: all.
        epoch: whose order the batches come in.
    """
    was_training = model.training
    device = model.linear.weight.device
    model.eval()
    total, count = 0.0, 0
    states = None
    for features, labels in itertools.islice(batches.epoch(epoch), limit or None):
        if states is None or not batches.carried:
            states = model.zero_states(len(features))
        labels = labels.to(device)
        logits, states = model(features.to(device), states)
        total += functional.cross_entropy(logits, labels.flatten(), reduction="sum").item()
        count += labels.numel()
    model.train(was_training)
    return total / count
