"""How each side trains charlm's model: by charlm's own Trainer, with FusedLSTM or with nn.LSTM, or
by a loop as people write it by hand.

All train on the same characters, drawn at random from as many as Tiny Shakespeare has: a step takes
as long whatever the text says, and no file is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from charlm.corpus import Ids
from charlm.optimisation import OPTIMIZERS
from charlm.settings import Config
from charlm.training import Trainer
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.steppers import Stepper

VOCABULARY, LENGTH = 65, 100_000  # of the text, in characters
CELLS = {"fused": "fused", "torch": "lstm"}  # charlm's own, by side
# A record after every step, so that to ask for a record is to ask for a step: that costs 2 us, less
# than a thousandth of the smallest preset's. Nothing is evaluated, and nothing ends the run.
EVERY_STEP = {"steps": 10**9, "warmup": 0.0, "validation": 0.0, "test": 0.0, "stop": "never",
              "eval_every": 1, "eval_from": 0, "eval_train": False}  # fmt: skip


def text() -> Ids:
    """The characters' ids, the same in every process."""
    return np.random.default_rng(0).integers(VOCABULARY, size=LENGTH, dtype=np.uint8)


def stepper(side: str, config: Config) -> Stepper:
    """One whole step of training a call, which gives its loss."""
    if side == "plain":
        return Stepper(plain_loop(config), learns=True)
    trainer = Trainer(config.override({**EVERY_STEP, "cell": CELLS[side]}), text(), VOCABULARY)
    records = trainer.train()
    return Stepper(lambda: next(records).train_loss, learns=True)


class PlainModel(nn.Module):
    """Embedding or one-hot vectors, nn.LSTM from zero states, dropout, a linear layer, the loss."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.embedding or VOCABULARY
        self.embedding = nn.Embedding(VOCABULARY, width) if config.embedding else None
        self.lstm = nn.LSTM(width, config.hidden, config.layers, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden, VOCABULARY)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.embedding is None:
            features = functional.one_hot(x, VOCABULARY).float()
        else:
            features = self.embedding(x)
        output, _ = self.lstm(features)
        logits = self.head(self.dropout(output))
        return functional.cross_entropy(logits.view(-1, VOCABULARY), y.view(-1))


def plain_loop(config: Config) -> Callable[[], float]:
    """A preset's training in plain PyTorch, its batches drawn as nanoGPT's `get_batch` draws them,
    its optimiser the preset's with what torch takes where nothing is said."""
    data, T = text(), config.window
    torch.manual_seed(config.seed)
    model = PlainModel(config)
    optimizer = OPTIMIZERS[config.optimizer](
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )

    def get_batch() -> tuple[Tensor, Tensor]:
        at = torch.randint(len(data) - T, (config.batch_size,))
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in at])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in at])
        return x, y

    def step() -> float:
        x, y = get_batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
            loss = model(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        return loss.item()

    return step
