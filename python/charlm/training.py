"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from charlm.batches import Batch, Batches, Rows, Windows, rows_for_evaluation
from charlm.corpus import split
from charlm.errors import CharlmError
from charlm.evaluation import evaluate
from charlm.model import CharacterModel, States, detach
from charlm.presets import Config


@dataclass(frozen=True)
class Record:
    """One line of metrics.jsonl. Losses are mean cross-entropies in nats per character."""

    epoch: int  # the epoch that is done or under way, counted from 1
    step: int  # optimiser steps so far
    train_loss: float  # mean over the batches since the last record, each weighing the same
    val_loss: float | None
    tokens_seen: int  # characters trained on so far
    lr: float  # of the last step
    seconds: float  # since training began, evaluations included


def learning_rate(config: Config, step: int, total: int) -> float:
    """The learning rate of step 0 <= step < total; a pure function, so nothing has to be saved."""
    warmup = round(config.warmup * total)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


class Trainer:
    """A model on its way from its seed to its last step.

    Where it stands is `step`, `epoch`, `batch` and `states`; the learning rate and the order of
    the batches follow from them and the config. `notes` says what was left out and why.

    Args:
        config: the run's settings.
        ids: the whole text, (N,) int64.
        vocabulary_size: V.

    Raises:
        CharlmError: the text is too short for one batch, or the device isn't there.
    """

    def __init__(self, config: Config, ids: Tensor, vocabulary_size: int) -> None:
        self.config = config
        self.notes: list[str] = []
        try:
            torch.zeros((), device=config.device).item()
        except (RuntimeError, AssertionError) as error:  # a CPU torch asserts when asked for CUDA
            reason = str(error).splitlines()[0]
            raise CharlmError(f"cannot use device {config.device!r}: {reason}") from None
        training, held_out = split(ids.to(config.device), [config.validation])
        self.batches = self._batches(training)
        self.validation: Batches | None = None
        if config.validation:
            self.validation = rows_for_evaluation(held_out, config.window, config.batch_size)
            if self.validation is None:
                self.notes.append(
                    f"no validation loss: the {len(held_out)} characters held out don't fill one "
                    f"window of {config.window}"
                )
        torch.manual_seed(config.seed)
        # Made on the CPU, so that a seed gives the same weights on every device.
        self.model = CharacterModel(
            vocabulary_size,
            embedding=config.embedding,
            hidden=config.hidden,
            layers=config.layers,
            dropout=config.dropout,
            cell=config.cell,
        ).to(config.device)
        optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        # The fused update takes half of the plain one: 0.7 ms, not 1.4, of some 20 ms a step.
        self.optimizer = optimizer(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.total_steps = config.steps or (config.epochs or 0) * len(self.batches)
        self.step = self.epoch = self.batch = self.tokens_seen = 0
        self.states: States | None = None

    def _batches(self, ids: Tensor) -> Batches:
        config = self.config
        if config.batches == "rows":
            return Rows(ids, config.window, config.batch_size)
        return Windows(ids, config.window, config.batch_size, config.stride, config.seed)

    def train(
        self,
        on_step: Callable[[Tensor], None] = lambda loss: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Record]:
        """Trains to the last step or until `stopped()`, and yields a record whenever one is due.

        Args:
            on_step: called after every step with its loss, a 0-d tensor.
            stopped: asked before every step; when it says so, the record of the steps since the
                last one comes without a validation loss.

        Raises:
            CharlmError: the loss is no longer finite.
        """
        begin = time.perf_counter()
        every = self.config.eval_every
        losses: list[Tensor] = []  # since the last record; read only there, to not wait for a GPU
        self.model.train()
        stream = self._stream()
        while True:
            done = self.step == self.total_steps
            due = done or (self.step % every == 0 if every else self.batch == 0)
            stop = done or stopped()
            if losses and (due or stop):
                train_loss = torch.stack(losses).cpu().double().mean().item()
                if not math.isfinite(train_loss):
                    raise CharlmError(
                        f"the loss is {train_loss} at step {self.step}: a smaller --lr than "
                        f"{self.config.lr:g} may help"
                    )
                val_loss = None
                if self.validation is not None and due:
                    val_loss = evaluate(self.model, self.validation)
                losses.clear()
                yield Record(
                    epoch=self.epoch + (self.batch > 0),
                    step=self.step,
                    train_loss=train_loss,
                    val_loss=val_loss,
                    tokens_seen=self.tokens_seen,
                    lr=self.optimizer.param_groups[0]["lr"],
                    seconds=time.perf_counter() - begin,
                )
            if stop:
                return
            losses.append(self._step(*next(stream)))
            on_step(losses[-1])

    def _stream(self) -> Iterator[Batch]:
        """The batches from where training stands on, epoch after epoch; _step moves the place."""
        while True:
            yield from self.batches.epoch(self.epoch, self.batch)

    def _step(self, features: Tensor, labels: Tensor) -> Tensor:
        """One optimiser step on features and labels (B, T); returns its loss, 0-d, detached."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, self.total_steps)
        if self.states is None:
            self.states = self.model.zero_states(len(features))
        logits, states = self.model(features, self.states)
        loss = functional.cross_entropy(logits, labels.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()

        self.tokens_seen += labels.numel()
        self.step += 1
        self.batch += 1
        if self.batch == len(self.batches):
            self.epoch, self.batch = self.epoch + 1, 0
        carried = self.batches.carried and self.batch > 0  # a row's end isn't its beginning's past
        self.states = detach(states) if carried else None
        return loss.detach()
