"""Checkpoints: all that a run needs to go on with the same bits, in one file.

checkpoint.safetensors holds as tensors the weights (model.*), the optimiser's state
(optimizer.I.NAME for the I-th parameter), the carried state (state.I), the generators of dropout
(generator.cpu, generator.cuda) and the sum of the losses since the last record (losses); as JSON in
its metadata the place in the data and the rest. One file, because two could not be moved to their
places at once. Where several processes train, the first has written the states of all rows, and
generator.cpu.R, generator.cuda.R and losses.R are the R-th other one's; any number of processes can
go on from there, and as many do with the same bits.
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from charlm.files import write_atomically
from charlm.model import CharacterModel
from charlm.optimisation import STATE
from charlm.processes import share_as, whole
from charlm.reading import TensorFile, blaming, build, parse_json
from charlm.training import Trainer

CHECKPOINT = "checkpoint.safetensors"
_WANTED = "a checkpoint of this run"
_SHARE = 0.01  # of the time, that checkpoints may take by default


@dataclass(frozen=True)
class Values:
    """What a checkpoint holds beside its tensors."""

    step: int
    epoch: int
    batch: int
    tokens_seen: int
    losses: int  # in the sum of them
    lr: float
    seconds: float
    lowest_mean: float | None
    metrics: int  # bytes of metrics.jsonl that belong to it; what comes after is written anew


def _own(trainer: Trainer) -> dict[str, Tensor]:
    """What each process has for itself."""
    tensors = {"losses": trainer.loss_sum, "generator.cpu": torch.get_rng_state()}
    if trainer.device.type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(trainer.device)
    return tensors


def _capture(trainer: Trainer, metrics: int) -> tuple[dict[str, Tensor], Values]:
    """All processes call it at the same step."""
    processes = trainer.processes
    tensors = {f"model.{name}": whole(v) for name, v in trainer.model.state_dict().items()}
    for index, entry in trainer.optimizer.state_dict()["state"].items():
        for name, value in sorted(entry.items()):  # in the same order in every process
            if value is not None:  # SGD without momentum
                tensors[f"optimizer.{index}.{name}"] = whole(torch.as_tensor(value))
    for index, state in enumerate(trainer.states or ()):
        tensors[f"state.{index}"] = processes.joined_rows(state, trainer.config.batch_size)
    for name, value in _own(trainer).items():
        for rank, of_rank in enumerate(processes.gathered(value)):
            tensors[_name(name, rank)] = of_rank
    values = Values(
        step=trainer.step,
        epoch=trainer.epoch,
        batch=trainer.batch,
        tokens_seen=trainer.tokens_seen,
        losses=trainer.loss_count,
        lr=trainer.lr,
        seconds=trainer.seconds,
        lowest_mean=None if math.isinf(trainer.lowest_mean) else trainer.lowest_mean,
        metrics=metrics,
    )
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, values


def _expected(trainer: Trainer, values: Values, names: set[str]) -> dict[str, Tensor]:
    """Tensors of the shapes and dtypes that a checkpoint of this trainer has at such a place.

    Raises:
        ValueError: there is no such place.
    """
    if not trainer.is_place(values.step, values.epoch, values.batch):
        raise ValueError(
            f"step {values.step} isn't at batch {values.batch} of epoch {values.epoch}"
        )
    if min(values.tokens_seen, values.losses, values.metrics) < 0:
        raise ValueError("it counts below zero")
    tensors = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    for index, parameter in enumerate(trainer.model.learned() if values.step else ()):
        for name, scalar in STATE[trainer.config.optimizer].items():
            shape = () if scalar else parameter.shape
            tensors[f"optimizer.{index}.{name}"] = torch.empty(shape, device="meta")
    if trainer.batches.carried and values.batch:
        for index, state in enumerate(trainer.model.zero_states(trainer.config.batch_size)):
            tensors[f"state.{index}"] = state
    own = _own(trainer) | {"generator.cuda": torch.empty(16, dtype=torch.uint8, device="meta")}
    for name, value in own.items():
        if name in names or name != "generator.cuda":
            tensors |= {_name(name, rank): value for rank in range(_writers(names))}
    return tensors


def _name(name: str, rank: int) -> str:
    """Of what a process has for itself."""
    return f"{name}.{rank}" if rank else name


def _writers(names: Collection[str]) -> int:
    """How many processes trained what a checkpoint with tensors of these names is of."""
    rank = 1
    while f"losses.{rank}" in names:
        rank += 1
    return rank


def _restore(trainer: Trainer, tensors: dict[str, Tensor], values: Values) -> None:
    model = {name[6:]: tensors.pop(name) for name in list(tensors) if name.startswith("model.")}
    trainer.load_weights(model)
    _restore_own(trainer, tensors, values)
    rows = trainer.processes.rows(trainer.config.batch_size)
    states = [tensors.pop(f"state.{index}") for index in range(2) if f"state.{index}" in tensors]
    trainer.states = tuple(state[:, rows].to(trainer.device) for state in states) or None
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in sorted(tensors.items(), key=lambda item: item[0]):
        _, index, key = name.split(".")
        of = value if value.dim() == 0 else share_as(value, trainer.model.learned()[int(index)])
        state.setdefault(int(index), {})[key] = of
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})

    for name in ("step", "epoch", "batch", "tokens_seen", "lr", "seconds"):
        setattr(trainer, name, getattr(values, name))
    trainer.loss_count = values.losses
    trainer.lowest_mean = math.inf if values.lowest_mean is None else values.lowest_mean


def _restore_own(trainer: Trainer, tensors: dict[str, Tensor], values: Values) -> None:
    """Takes what each process had for itself out of the tensors, and has its own again; where they
    were more or fewer, the loss is shared out and dropout draws from new seeds."""
    rank, writers = trainer.processes.rank, _writers(tensors)
    kept: dict[str, list[Tensor]] = {}
    for name in ("losses", "generator.cpu", "generator.cuda"):
        names = [_name(name, other) for other in range(writers)]
        kept[name] = [tensors.pop(name) for name in names if name in tensors]
    same = writers == trainer.processes.size
    # Each process's sum is weighted so that their mean is the batches'.
    trainer.loss_sum.copy_(kept["losses"][rank] if same else torch.stack(kept["losses"]).mean())
    torch.manual_seed(trainer.processes.seed(trainer.config.seed) + values.step)
    if same:
        torch.set_rng_state(kept["generator.cpu"][rank])
    if same and kept["generator.cuda"] and trainer.device.type == "cuda":
        torch.cuda.set_rng_state(kept["generator.cuda"][rank], trainer.device)


class Checkpoints:
    """A run's checkpoint file, and when it is written.

    Args:
        folder: the run's; None where another process writes it.
        every: steps from one to the next; 0: as often as costs 1 % of the time.
    """

    def __init__(self, folder: Path | None, every: int = 0) -> None:
        self._folder = folder
        self._every = every
        self._next = math.inf if folder is None else 0.0

    @property
    def path(self) -> Path:
        assert self._folder is not None
        return self._folder / CHECKPOINT

    @property
    def exist(self) -> bool:
        return os.path.lexists(self.path)

    def due(self, trainer: Trainer) -> bool:
        """Is it time for one, after this step? All processes ask, and agree."""
        if self._every:
            return trainer.step % self._every == 0
        return trainer.processes.any(time.perf_counter() >= self._next, trainer.step)

    def save(self, trainer: Trainer, metrics: int) -> None:
        """Writes one; all processes call it, and the first one writes.

        Args:
            metrics: bytes of metrics.jsonl that belong to it; what comes after is written anew.

        Raises:
            CharlmError: there is no room for it. The one before stays.
        """
        begin = time.perf_counter()
        tensors, values = _capture(trainer, metrics)
        if self._folder is None:
            return
        # One key: safetensors writes several in an order that differs from time to time.
        metadata = {"charlm": json.dumps(dataclasses.asdict(values), allow_nan=False)}
        write_atomically(self.path, safetensors.torch.save(tensors, metadata))
        end = time.perf_counter()
        self._next = end + (end - begin) / _SHARE

    def check_model(self, vocabulary_size: int, hyperparameters: dict[str, Any]) -> None:
        """Makes sure that a model is as large as the file says before one is made.

        Raises:
            CharlmError: the file can't be read, or its weights are of another model.
        """
        with TensorFile(self.path, _WANTED) as file, blaming(self.path, _WANTED):
            model = CharacterModel.on_meta(vocabulary_size, hyperparameters, len(file.shapes))
            shapes = {name[6:]: s for name, s in file.shapes.items() if name.startswith("model.")}
            file.check(model.state_dict(), shapes)

    def load(self, trainer: Trainer) -> int:
        """Sets the trainer to where the checkpoint was made; returns the bytes of its metrics.

        Raises:
            CharlmError: the file can't be read, or isn't a checkpoint of such a run.
        """
        with TensorFile(self.path, _WANTED) as file, blaming(self.path, _WANTED):
            values = build(Values, parse_json(file.metadata["charlm"].encode()))
            file.check(_expected(trainer, values, set(file.shapes)))
            _restore(trainer, file.read(), values)
        return values.metrics
