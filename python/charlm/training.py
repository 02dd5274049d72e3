"""The training loop."""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from charlm.batches import Batch, Batches, Rows, Share, Windows, cut, rows_for_evaluation
from charlm.corpus import Ids, split
from charlm.errors import CharlmError
from charlm.evaluation import losses
from charlm.model import INITIAL_WEIGHTS, CharacterModel, States, detach
from charlm.optimisation import OPTIMIZERS, Place, Record, learning_rate, reason_to_stop
from charlm.processes import ALONE, Processes, share_as, whole
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

    Where several processes train together, each has such a trainer, whose `states` and loss are
    those of its own rows, and calls the same methods in the same order.

    Args:
        config: the run's settings; its device is one that `device_of` takes.
        ids: the whole text, (N,).
        vocabulary_size: V.
        processes: that train together.

    Raises:
        CharlmError: the text is too short for one batch, the device isn't there, or there are more
            processes than rows in a batch.
    """

    def __init__(
        self, config: Config, ids: Ids, vocabulary_size: int, processes: Processes = ALONE
    ) -> None:
        if processes.size > config.batch_size:
            raise CharlmError(
                f"{processes.size} processes need as many rows in a batch at least: "
                f"--batch-size {config.batch_size} is too small"
            )
        if config.fsdp and config.samples != "end":
            raise CharlmError(
                f"with --fsdp the sample comes at the end: not --samples {config.samples}"
            )
        self.config, self.processes = config, processes
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
        self._check_dtype(model)
        self.model = model.to(self.device)
        if not processes.first:
            torch.manual_seed(processes.seed(config.seed))
        self._together = processes.together(self.model, self.device, config.fsdp)
        self._run = torch.compile(self._together) if config.compile else self._together
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

    def _check_dtype(self, model: CharacterModel) -> None:
        """torch's LSTM has no bfloat16 on processors without instructions for it."""
        config = self.config
        if self.device.type != "cpu" or config.dtype != "bfloat16" or config.cell == "fused":
            return
        ids = torch.zeros(1, 1, dtype=torch.int64)
        try:
            with torch.random.fork_rng(devices=()), torch.autocast("cpu", torch.bfloat16):
                model(ids, model.zero_states(1))
        except RuntimeError as error:
            raise CharlmError(
                f"torch can't train cell {config.cell!r} in bfloat16 on this processor "
                f"({str(error).partition('. ')[0]}): --cell fused, or --dtype float32"
            ) from None

    @property
    def stopped_early(self) -> str:
        """Why training ends before its last step; "" where it doesn't."""
        return reason_to_stop(self.config, self.records)

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps or bool(self.stopped_early)

    def whole_model(self) -> CharacterModel:
        """For the first process the model with all of its weights; all processes call it."""
        if not self.config.fsdp or self.processes.size == 1:
            return self.model
        weights = {name: whole(value).cpu() for name, value in self.model.state_dict().items()}
        if not self.processes.first:
            return self.model
        model = CharacterModel.on_meta(
            self.model.vocabulary_size, self.model.hyperparameters, self.config.layers
        )
        model.load_state_dict(weights, assign=True)
        return model

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Of a whole model, whose shares the processes then have."""
        own = self.model.state_dict()
        self.model.load_state_dict({name: share_as(weights[name], own[name]) for name in own})

    def is_place(self, step: int, epoch: int, batch: int) -> bool:
        """Can training stand there?"""
        batches = len(self.batches)
        return 0 <= batch < batches and epoch >= 0 and step == epoch * batches + batch

    def running_mean(self) -> float:
        """The mean loss of the steps since the last record, every character weighing the same; of
        several processes, each has that of its own rows."""
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
        (loss_sum,) = self.processes.total(self.loss_sum.item())
        train_loss = loss_sum / self.processes.size / self.loss_count
        if not math.isfinite(train_loss):
            raise CharlmError(
                f"the loss is {train_loss} at step {self.step}: a smaller --lr than "
                f"{self.config.lr:g} may help"
            )
        val_loss = None
        limit = self.config.eval_batches
        if evaluated and self.validation is not None:
            val_loss = self._evaluated(self.validation, limit)
        if evaluated and self.config.eval_train:
            train_loss = self._evaluated(self.batches, limit, self.epoch)
        return Record(
            epoch=self.epoch + (self.batch > 0),
            step=self.step,
            train_loss=train_loss,
            val_loss=val_loss,
            tokens_seen=self.tokens_seen,
            lr=self.lr,
            seconds=self.seconds,
        )

    def _evaluated(self, batches: Batches, limit: int, epoch: int = 0) -> float:
        mine = Share(batches, self.processes.rows)
        total, count = self.processes.total(*losses(self.model, mine, limit, epoch))
        return total / count

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
        self.optimizer.zero_grad()
        loss, states = self._backward(features, labels)
        if config.clip:
            nn.utils.clip_grad_norm_(self.model.learned(), config.clip)
        self.optimizer.step()

        self.tokens_seen += labels.numel()
        self.step += 1
        self.batch += 1
        if self.batch == len(self.batches):
            self.epoch, self.batch = self.epoch + 1, 0
        carried = self.batches.carried and self.batch > 0  # a row's end isn't its beginning's past
        self.states = states if carried else None
        self.loss_sum += loss.double() * labels.numel()
        self.loss_count += labels.numel()
        return loss

    def _backward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, States]:
        """The gradients of the batch's mean loss, into the parameters' .grad.

        Returns the loss of this process's rows, weighted so that the mean over the processes is the
        batch's, and the states after them, both detached.
        """
        processes = self.processes
        rows, size = processes.rows(len(labels)), processes.size
        if rows.start == rows.stop:  # the last windows of a pass may be fewer than the processes
            rows, size = slice(0, 1), 0
        states = self.states or self.model.zero_states(rows.stop - rows.start)
        parts = cut(rows, self.config.accumulate)
        parts_losses: list[Tensor] = []
        after: list[States] = []
        for part in parts:
            mine = slice(part.start - rows.start, part.stop - rows.start)
            # The gradients of all parts are sent at once.
            with processes.apart(self._together, part is not parts[-1]):
                before = tuple(state[:, mine] for state in states)
                loss, last = self._loss(features[part], labels[part], before)
                weight = size * (part.stop - part.start) / len(labels)
                if weight != 1:
                    loss = loss * weight
                loss.backward()
            parts_losses.append(loss.detach())
            after.append(detach(last))
        if len(parts) == 1:
            return parts_losses[0], after[0]
        states = tuple(torch.cat(of_parts, 1) for of_parts in zip(*after, strict=True))
        return torch.stack(parts_losses).sum(), states

    def _loss(self, features: Tensor, labels: Tensor, states: States) -> tuple[Tensor, States]:
        """Of features and labels (B, T) after the states: the mean loss, 0-d, and the states."""
        narrow = self.config.dtype == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=narrow):
            loss, states = self._run(features, states, labels)
        return loss, states
