"""Optimisers, learning-rate schedules and stop rules, each under the name that a preset gives.

A schedule and a stop rule are pure functions of the settings and of where training stands, so a
checkpoint has nothing of theirs to hold.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from charlm.settings import Config

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
# What each keeps for a parameter, and whether that is one number: what a checkpoint must hold.
_MOMENTS = {"step": True, "exp_avg": False, "exp_avg_sq": False}
STATE: dict[str, dict[str, bool]] = {"adam": _MOMENTS, "adamw": _MOMENTS, "sgd": {}}


@dataclass(frozen=True)
class Record:
    """One line of metrics.jsonl. Losses are mean cross-entropies in nats per character."""

    epoch: int  # the epoch that is done or under way, counted from 1
    step: int  # optimiser steps so far
    # Mean over the characters since the last record, in training; with eval_train over those of
    # eval_batches batches, in eval mode.
    train_loss: float
    val_loss: float | None
    tokens_seen: int  # characters trained on so far
    lr: float  # of the last step
    seconds: float  # of training, evaluations included, interruptions not

    @property
    def watched(self) -> float:
        """The loss that says whether training gets better: validation's, where there is one."""
        return self.train_loss if self.val_loss is None else self.val_loss


@dataclass(frozen=True)
class Place:
    """Where training stands before a step."""

    step: int  # 0 <= step < total
    total: int
    epoch: int  # passes done
    records: Sequence[Record] = ()


def _constant(config: "Config", place: Place) -> float:
    return 1.0


def _cosine(config: "Config", place: Place) -> float:
    """From 1 towards 0 along half a cosine, over the steps after the warm-up."""
    warmup = round(config.warmup * place.total)
    return 0.5 * (1 + math.cos(math.pi * (place.step - warmup) / (place.total - warmup)))


def _decay(config: "Config", place: Place) -> float:
    """Multiplied once a pass (document 003)."""
    return config.decay**place.epoch


def _plateau(config: "Config", place: Place) -> float:
    """Multiplied whenever `patience` records in a row have brought no lower loss."""
    best, waited, drops = math.inf, 0, 0
    for record in place.records:
        waited = 0 if record.watched < best else waited + 1
        best = min(best, record.watched)
        if waited == config.patience:
            waited, drops = 0, drops + 1
    return config.decay**drops


Schedule = Callable[["Config", Place], float]
SCHEDULES: dict[str, Schedule] = {
    "constant": _constant,
    "cosine": _cosine,
    "decay": _decay,
    "plateau": _plateau,
}


def learning_rate(config: "Config", place: Place) -> float:
    """The learning rate of the next step: the schedule's, after a linear warm-up."""
    warmup = round(config.warmup * place.total)
    if place.step < warmup:
        return config.lr * (place.step + 1) / (warmup + 1)
    return config.lr * SCHEDULES[config.schedule](config, place)


def depends_on_length(config: "Config") -> bool:
    """Would a longer run have had other learning rates from its first steps on?"""
    return config.schedule == "cosine" or config.warmup > 0


def _never(config: "Config", records: Sequence[Record]) -> str:
    return ""


def _below(config: "Config", records: Sequence[Record]) -> str:
    """On the mean since the record before, an epoch's: one lucky batch doesn't end a run."""
    if records and records[-1].train_loss < config.stop_below:
        return f"the training loss is below {config.stop_below:g}"
    return ""


def _out_of_patience(config: "Config", records: Sequence[Record]) -> str:
    losses = [record.watched for record in records]
    if losses and len(losses) - 1 - losses.index(min(losses)) >= config.patience:
        return f"no lower loss in {config.patience} records"
    return ""


# Why training ends before its last step; "" for going on.
STOP_RULES: dict[str, Callable[["Config", Sequence[Record]], str]] = {
    "never": _never,
    "below": _below,
    "patience": _out_of_patience,
}


def reason_to_stop(config: "Config", records: Sequence[Record]) -> str:
    return STOP_RULES[config.stop](config, records)
