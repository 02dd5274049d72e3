"""Checkpoints: all that a run needs to go on with the same bits, in one file.

checkpoint.safetensors holds as tensors the weights (model.*), the optimiser's state
(optimizer.I.NAME for the I-th parameter), the carried state (state.I), the generators of dropout
(generator.cpu, generator.cuda) and the sum of the losses since the last record; as JSON in its
metadata the place in the data and the rest. One file, because two could not be moved to their
places at once.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from charlm.errors import CharlmError
from charlm.files import write_atomically
from charlm.training import Trainer

CHECKPOINT = "checkpoint.safetensors"
_SHARE = 0.01  # of the time, that checkpoints may take by default

Values = dict[str, Any]


def _capture(trainer: Trainer) -> tuple[dict[str, Tensor], Values]:
    tensors = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    for index, entry in trainer.optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            if value is not None:  # SGD without momentum
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    for index, state in enumerate(trainer.states or ()):
        tensors[f"state.{index}"] = state
    tensors["losses"] = trainer.loss_sum
    tensors["generator.cpu"] = torch.get_rng_state()
    if trainer.device.type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(trainer.device)
    values = {
        "step": trainer.step,
        "epoch": trainer.epoch,
        "batch": trainer.batch,
        "tokens_seen": trainer.tokens_seen,
        "losses": trainer.loss_count,
        "lr": trainer.lr,
        "seconds": trainer.seconds,
        "lowest_mean": None if math.isinf(trainer.lowest_mean) else trainer.lowest_mean,
    }
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, values


def _restore(trainer: Trainer, tensors: dict[str, Tensor], values: Values) -> None:
    model = {name[6:]: tensors.pop(name) for name in list(tensors) if name.startswith("model.")}
    trainer.model.load_state_dict(model)
    trainer.loss_sum.copy_(tensors.pop("losses"))
    torch.set_rng_state(tensors.pop("generator.cpu"))
    cuda = tensors.pop("generator.cuda", None)
    if trainer.device.type == "cuda":
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, trainer.device)
        else:
            torch.cuda.manual_seed(trainer.config.seed + values["step"])
    states = [tensors.pop(f"state.{index}") for index in range(2) if f"state.{index}" in tensors]
    trainer.states = tuple(state.to(trainer.device) for state in states) or None
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        _, index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": state, "param_groups": groups})

    for name in ("step", "epoch", "batch", "tokens_seen"):
        setattr(trainer, name, int(values[name]))
    trainer.loss_count = int(values["losses"])
    trainer.lr, trainer.seconds = float(values["lr"]), float(values["seconds"])
    lowest = values["lowest_mean"]
    trainer.lowest_mean = math.inf if lowest is None else float(lowest)


class Checkpoints:
    """A run's checkpoint file, and when it is written.

    Args:
        folder: the run's.
        every: steps from one to the next; 0: as often as costs 1 % of the time.
    """

    def __init__(self, folder: Path, every: int = 0) -> None:
        self.path = folder / CHECKPOINT
        self._every = every
        self._next = 0.0

    def due(self, step: int) -> bool:
        """Is it time for one, after this step?"""
        return step % self._every == 0 if self._every else time.perf_counter() >= self._next

    def save(self, trainer: Trainer, metrics: int) -> None:
        """Writes one.

        Args:
            metrics: bytes of metrics.jsonl that belong to it; what comes after is written anew.

        Raises:
            CharlmError: there is no room for it. The one before stays.
        """
        begin = time.perf_counter()
        tensors, values = _capture(trainer)
        # One key: safetensors writes several in an order that differs from time to time.
        metadata = {"charlm": json.dumps({**values, "metrics": metrics}, allow_nan=False)}
        write_atomically(self.path, safetensors.torch.save(tensors, metadata))
        end = time.perf_counter()
        self._next = end + (end - begin) / _SHARE

    def load(self, trainer: Trainer) -> int:
        """Sets the trainer to where the checkpoint was made; returns the bytes of its metrics.

        Raises:
            CharlmError: the file can't be read, or isn't a checkpoint of such a run.
        """
        try:
            data = self.path.read_bytes()
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            values = json.loads(header["__metadata__"]["charlm"])
            metrics = int(values["metrics"])
            _restore(trainer, safetensors.torch.load(data), values)
            return metrics
        except OSError as error:
            raise CharlmError(f"cannot read {self.path}: {error.strerror}") from None
        except (SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CharlmError(f"{self.path} isn't a checkpoint of this run: {reason}") from None
