"""The folder of a run: what is in it, and how it is written and read.

config.json        every setting of the run, and under "facts" what came of text and settings
model.safetensors  the weights; vocabulary and hyper-parameters in its metadata
metrics.jsonl      one training.Record a line
sample.txt         prompt and sample

A file is there whole or not at all: it is written beside its place and moved there.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open

from charlm.errors import CharlmError
from charlm.model import CharacterModel
from charlm.optimisation import Record
from charlm.settings import Config
from charlm.vocabulary import Vocabulary

CONFIG, MODEL, METRICS, SAMPLE = "config.json", "model.safetensors", "metrics.jsonl", "sample.txt"


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old one or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _json(values: Any, indent: int | None = None) -> str:
    return json.dumps(values, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def check_free(path: Path) -> None:
    """Raises CharlmError where a run may not be written: nothing is ever overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CharlmError(
            f"{path} exists and isn't an empty folder: choose another --run folder or move it away"
        )


class RunFolder:
    """One run's folder, to write into while training or to read back.

    Raises:
        CharlmError: from the methods that read, when a file is missing or isn't charlm's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[str] = []

    @classmethod
    def create(cls, path: Path | None, preset: str) -> "RunFolder":
        """Makes the folder: `path`, or the first of runs/<preset>-1, -2, ... that isn't there."""
        try:
            if path is not None:
                check_free(path)
                path.mkdir(parents=True, exist_ok=True)
                return cls(path)
            for number in itertools.count(1):
                path = Path("runs") / f"{preset}-{number}"
                try:
                    path.mkdir(parents=True)  # fails where another run was quicker
                    return cls(path)
                except FileExistsError:
                    if not path.parent.is_dir():
                        raise
            raise AssertionError("count() has no end")
        except OSError as error:
            raise CharlmError(f"cannot make the run folder {path}: {error.strerror}") from None

    def write_config(self, config: Config, facts: Mapping[str, Any]) -> None:
        text = _json({**config.to_json(), "facts": dict(facts)}, indent=2)
        write_atomically(self.path / CONFIG, text.encode())

    def write_model(self, model: CharacterModel, vocabulary: Vocabulary) -> None:
        about = {
            "vocabulary": vocabulary.characters,
            "unit": vocabulary.unit,
            "hyperparameters": model.hyperparameters,
        }
        # One key: safetensors writes several in an order that differs from time to time.
        metadata = {"charlm": json.dumps(about)}
        tensors = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
        data = safetensors.torch.save(tensors, metadata)
        write_atomically(self.path / MODEL, data)

    def add_record(self, record: Record) -> None:
        values = dataclasses.asdict(record)
        if record.val_loss is None:
            del values["val_loss"]
        self._lines.append(_json(values))
        write_atomically(self.path / METRICS, "".join(self._lines).encode())

    def write_sample(self, text: str) -> None:
        write_atomically(self.path / SAMPLE, text.encode())

    def read_config(self) -> Config:
        try:
            values = json.loads(self._file(CONFIG).read_bytes())
            values.pop("facts")
            return Config.from_json(values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CharlmError(f"{self.path / CONFIG} isn't a run's settings: {error}") from None

    def read_model(self) -> tuple[CharacterModel, Vocabulary]:
        """The model, in eval mode on the CPU, and its vocabulary."""
        path = self._file(MODEL)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = json.loads(metadata["charlm"])
            vocabulary = Vocabulary(about["vocabulary"], about.get("unit", "characters"))
            model = CharacterModel(len(vocabulary), **about["hyperparameters"])
            model.load_state_dict(tensors)
        except (SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
            raise CharlmError(f"{path} isn't a model that charlm saved: {error}") from None
        return model.eval(), vocabulary

    def _file(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise CharlmError(f"{self.path} has no {name}: give the folder of a charlm run")
        return path
