"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from charlm.batches import Batch, Batches, Rows, Windows, rows_for_evaluation
from charlm.corpus import Ids, split
from charlm.errors import CharlmError
from charlm.evaluation import evaluate
from charlm.model import INITIAL_WEIGHTS, CharacterModel, States, detach
from charlm.optimisation import OPTIMIZERS, Place, Record, learning_rate, reason_to_stop
from charlm.settings import Config


def device_of(name: str) -> torch.device:
    """The device of a name; "auto" is cuda where it is there, else cpu.

    Raises:
        CharlmError: it isn't there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros((), device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # a CPU torch asserts when asked for CUDA
        reason = str(error).splitlines()[0]
        raise CharlmError(f"cannot use device {name!r}: {reason}") from None


def hyperparameters(config: Config) -> dict[str, Any]:
    """The settings that the model is made of."""
    names = ("embedding", "hidden", "layers", "dropout", "cell", "biases")
    return {name: getattr(config, name) for name in names}


class Trainer:
    """A model on its way from its seed to its last step.

    Where it stands is `step`, `epoch`, `batch`, `states` and `records`; the learning rate, the
    order of the batches and whether to stop early follow from them and the config. `notes` says
    what was left out and why.

    Args:
        config: the run's settings; its device is one that `device_of` takes.
        ids: the whole text, (N,).
        vocabulary_size: V.

    Raises:
        CharlmError: the text is too short for one batch, or the device isn't there.
    """

    def __init__(self, config: Config, ids: Ids, vocabulary_size: int) -> None:
        self.config = config
        self.notes: list[str] = []
        self.device = device_of(config.device)
        training, held_out, _ = split(ids, [config.validation, config.test])
        self.batches: Batches = self._batches(training)
        self.validation: Batches | None = None
        if config.validation:
            self.validation = rows_for_evaluation(held_out, config.window, config.batch_size)
            if self.validation is None:
                self.notes.append(
                    f"no validation loss: the {len(held_out)} characters held out don't fill one "
                    f"window of {config.window}"
                )
        # The documents ask for it; FusedLSTM gives the same bits on every run anyway.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        torch.manual_seed(config.seed)
        # Made on the CPU, so that a seed gives the same weights on every device.
        model = CharacterModel(vocabulary_size, **hyperparameters(config))
        INITIAL_WEIGHTS[config.initial](model.recurrent)
        self.model = model.to(self.device)
        # The fused update takes half of the plain one: 0.7 ms, not 1.4, of some 20 ms a step.
        self.optimizer = OPTIMIZERS[config.optimizer](
            self.model.learned(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.total_steps = config.steps or (config.epochs or 0) * len(self.batches)
        self.step = self.epoch = self.tokens_seen = 0
        self.batch: int = 0
        self.states: States | None = None
        self.records: list[Record] = []  # those that are on schedule
        self.lr = config.lr  # of the last step
        self.seconds = 0.0  # spent in train() so far, all sessions together
        self.lowest_mean = math.inf  # the lowest running_mean, for the log line that shows it
        # Of the characters' losses since the last record, and how many they are. Read there only:
        # reading makes a GPU wait.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        self.loss_count = 0

    def _batches(self, ids: Ids) -> Batches:
        config = self.config
        if config.batches == "rows":
            return Rows(ids, config.window, config.batch_size)
        return Windows(ids, config.window, config.batch_size, config.stride, config.seed)

    @property
    def stopped_early(self) -> str:
        """Why training ends before its last step; "" where it doesn't."""
        return reason_to_stop(self.config, self.records)

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps or bool(self.stopped_early)

    def is_place(self, step: int, epoch: int, batch: int) -> bool:
        """Can training stand there?"""
        batches = len(self.batches)
        return 0 <= batch < batches and epoch >= 0 and step == epoch * batches + batch

    def running_mean(self) -> float:
        """The mean loss of the steps since the last record, every character weighing the same."""
        return self.loss_sum.item() / self.loss_count if self.loss_count else math.nan

    def train(
        self,
        on_step: Callable[[Tensor], None] = lambda loss: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Record]:
        """Trains to the last step or until `stopped()`, and yields a record whenever one is due.

        A record that is off schedule, because training ends there, isn't added to `records`, and
        the losses that it covers stay: whoever goes on from there makes the scheduled one.

        Args:
            on_step: called after every step with its loss, a 0-d tensor.
            stopped: asked before every step; when it says so, the record of the steps since the
                last one comes without a validation loss.

        Raises:
            CharlmError: the loss is no longer finite.
        """
        begin = time.perf_counter() - self.seconds
        self.model.train()
        stream = self._stream()
        while True:
            self.seconds = time.perf_counter() - begin
            if self.loss_count and self._record_due():
                record = self._record(evaluated=True)
                self.seconds = time.perf_counter() - begin
                self.records.append(record)
                self.loss_sum.zero_()
                self.loss_count = 0
                yield record
            if self.finished or stopped():
                if self.loss_count:
                    yield self._record(evaluated=self.finished)
                return
            loss = self._step(*next(stream))
            self.seconds = time.perf_counter() - begin
            on_step(loss)

    def _record_due(self) -> bool:
        every = self.config.eval_every
        if not every:
            return self.batch == 0
        first = self.config.eval_from or every
        return self.step >= first and (self.step - first) % every == 0

    def _record(self, evaluated: bool) -> Record:
        """Of the steps since the last one; `evaluated`: with a validation loss, where there is."""
        train_loss = self.running_mean()
        if not math.isfinite(train_loss):
            raise CharlmError(
                f"the loss is {train_loss} at step {self.step}: a smaller --lr than "
                f"{self.config.lr:g} may help"
            )
        val_loss = None
        limit = self.config.eval_batches
        if evaluated and self.validation is not None:
            val_loss = evaluate(self.model, self.validation, limit=limit)
        if evaluated and self.config.eval_train:
            train_loss = evaluate(self.model, self.batches, limit=limit, epoch=self.epoch)
        return Record(
            epoch=self.epoch + (self.batch > 0),
            step=self.step,
            train_loss=train_loss,
            val_loss=val_loss,
            tokens_seen=self.tokens_seen,
            lr=self.lr,
            seconds=self.seconds,
        )

    def _stream(self) -> Iterator[Batch]:
        """The batches from where training stands on, epoch after epoch; _step moves the place."""
        while True:
            yield from self.batches.epoch(self.epoch, self.batch)

    def _step(self, features: Tensor, labels: Tensor) -> Tensor:
        """One optimiser step on features and labels (B, T); returns its loss, 0-d, detached."""
        config = self.config
        features, labels = features.to(self.device), labels.to(self.device)
        self.lr = learning_rate(
            config, Place(self.step, self.total_steps, self.epoch, self.records)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        if self.states is None:
            self.states = self.model.zero_states(len(features))
        narrow = config.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=narrow):
            logits, states = self.model(features, self.states)
        loss = functional.cross_entropy(logits.float(), labels.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        if config.clip:
            nn.utils.clip_grad_norm_(self.model.learned(), config.clip)
        self.optimizer.step()

        self.tokens_seen += labels.numel()
        self.step += 1
        self.batch += 1
        if self.batch == len(self.batches):
            self.epoch, self.batch = self.epoch + 1, 0
        carried = self.batches.carried and self.batch > 0  # a row's end isn't its beginning's past
        self.states = detach(states) if carried else None
        loss = loss.detach()
        self.loss_sum += loss.double() * labels.numel()
        self.loss_count += labels.numel()
        return loss
