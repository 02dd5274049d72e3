"""What a loss means, and the loss on held-out text."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from charlm.batches import IGNORED, Batches
from charlm.errors import CharlmError
from charlm.model import CharacterModel, States

Scores = Callable[[Tensor, States], tuple[Tensor, States]]


def perplexity(loss: float) -> float:
    """exp of a mean cross-entropy in nats: the number of equally likely next characters."""
    return math.exp(min(loss, 700.0))  # exp overflows a double at 709


def bits_per_character(loss: float) -> float:
    return loss / math.log(2)


def evaluate(model: CharacterModel, batches: Batches, weights: torch.dtype | None = None) -> float:
    """Mean cross-entropy in nats over every character of one pass, as `losses` has it."""
    total, count = losses(model, batches, weights=weights)
    return total / count


@torch.no_grad()
def losses(
    model: CharacterModel,
    batches: Batches,
    limit: int = 0,
    epoch: int = 0,
    weights: torch.dtype | None = None,
) -> tuple[float, int]:
    """The sum of the cross-entropies in nats of every character of one pass, and their number.

    Dropout is off; the model is left in the mode in which it came.

    Args:
        limit: take the first `limit` batches only; 0: all.
        epoch: whose order the batches come in.
        weights: narrower, bfloat16 or int8, to keep a fused cell's and the last layer's in.
    """
    was_training = model.training
    device = model.linear.weight.device
    model.eval()
    total, count = 0.0, 0
    states = None
    scores: Scores = model if weights is None else narrowed(model, weights)
    for features, labels in itertools.islice(batches.epoch(epoch), limit or None):
        if states is None or not batches.carried:
            states = model.zero_states(len(features))
        labels = labels.to(device)
        logits, states = scores(features.to(device), states)
        total += functional.cross_entropy(logits, labels.flatten(), reduction="sum").item()
        count += int((labels != IGNORED).sum())
    model.train(was_training)
    return total, count


def narrowed(model: CharacterModel, weights: torch.dtype) -> Scores:
    """The model as `charlm sample --weights` has it, for batches of any size.

    Raises:
        CharlmError: the cell isn't fused, or is on a GPU.
    """
    cell, device = model.hyperparameters["cell"], model.linear.weight.device
    if cell != "fused" or device.type != "cpu":
        raise CharlmError(f"narrower weights are for cell fused on the CPU, not {cell} on {device}")
    head, bias = model.linear.weight, model.linear.bias
    if weights is torch.int8:  # symmetric, a scale for each row
        scale = head.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        head = (head / scale).round() * scale
    else:
        head = head.to(weights).to(head.dtype)
    lstm: Any = model.recurrent
    streams: dict[int, Any] = {}  # by the size of the batch

    def scores(ids: Tensor, states: States) -> tuple[Tensor, States]:
        B = len(ids)
        if B not in streams:
            streams[B] = lstm.stream(B, weights=weights)
        stream = streams[B]
        stream.state = states
        output = stream(model.features(ids).transpose(0, 1).contiguous())  # (T, B, H)
        logits = functional.linear(output, head, bias)
        return logits.transpose(0, 1).flatten(0, 1), stream.state

    return scores
