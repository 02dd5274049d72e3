"""The folder of a run: what is in it, and how it is written and read.

config.json        every setting of the run, and under "facts" what came of text and settings
model.safetensors  the weights; vocabulary and hyper-parameters in its metadata
metrics.jsonl      one training.Record a line
sample.txt         prompt and sample
checkpoint.safetensors  what resuming needs: charlm.checkpoint
.lock              keeps a second writer out

A file is there whole or not at all: it is written beside its place and moved there. Metrics grow by
whole lines.
"""

import dataclasses
import errno
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

from charlm.errors import CharlmError
from charlm.files import is_leftover, write_atomically
from charlm.model import CharacterModel
from charlm.optimisation import Record
from charlm.reading import (
    TensorFile,
    blaming,
    parse_json,
    parse_lines,
    plain_name,
    read_json,
    read_lines,
    read_text,
)
from charlm.settings import Config
from charlm.vocabulary import Vocabulary

CONFIG, MODEL, METRICS, SAMPLE = "config.json", "model.safetensors", "metrics.jsonl", "sample.txt"


def _json(values: Any, indent: int | None = None) -> str:
    return json.dumps(values, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def check_free(path: Path) -> None:
    """Raises CharlmError where a run may not be written: nothing is ever overwritten."""
    if path.exists() and not (path.is_dir() and all(map(is_leftover, path.iterdir()))):
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
        """Appends a line to the metrics, or nothing.

        Raises:
            CharlmError: there is no room for it.
        """
        values = dataclasses.asdict(record)
        if record.val_loss is None:
            del values["val_loss"]
        path = self.path / METRICS
        size = self.metrics_size
        try:
            # Appended, for a file that is written anew at each of a million records takes for
            # ever. Not buffered: the line is there at once.
            with open(path, "ab", buffering=0) as file:
                line = _json(values).encode()
                if file.write(line) < len(line):
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
        except OSError as error:
            raise CharlmError(
                f"cannot write {path}: {error.strerror}; what was saved before is still there"
            ) from None

    @property
    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl."""
        path = self.path / METRICS
        return path.stat().st_size if path.is_file() else 0

    def cut_metrics(self, size: int, write: bool) -> list[Record]:
        """Takes back the records after the first `size` bytes, unless another process is to `write`
        that; returns those that stay.

        Raises:
            CharlmError: they aren't there, or aren't records.
        """
        path = self.path / METRICS
        data = self._metrics()[:size]
        if len(data) < size:
            raise CharlmError(
                f"{path} has {len(data):,} bytes, but its checkpoint knows of {size:,}"
            )
        records = parse_lines(data, Record, path)
        if write and os.path.lexists(path):
            write_atomically(path, data)
        return records

    def _metrics(self) -> bytes:
        path = self.path / METRICS
        return read_lines(path) if os.path.lexists(path) else b""

    def write_sample(self, text: str) -> None:
        write_atomically(self.path / SAMPLE, text.encode())

    def read_config(self) -> Config:
        return self._settings()[0]

    def read_facts(self) -> dict[str, Any]:
        """What came of text and settings."""
        return self._settings()[1]

    def _settings(self) -> tuple[Config, dict[str, Any]]:
        path = self.path / CONFIG
        wanted = "a run's settings"
        values = read_json(path, wanted)
        with blaming(path, wanted):
            facts = values.pop("facts")
            if not isinstance(facts, dict):
                raise ValueError("its facts are no JSON object")
            sources = facts.get("sources", [])
            if not isinstance(sources, list) or not all(isinstance(s, str) for s in sources):
                raise ValueError("its sources are no list of files")
            config = Config.from_json(values)
            if config.file is not None:
                plain_name(config.file)
        return config, facts

    def read_metrics(self) -> list[Record]:
        """The records so far; none where the first has not been reached."""
        return parse_lines(self._metrics(), Record, self.path / METRICS)

    def read_sample(self) -> str:
        """The last sample; empty where there is none yet."""
        path = self.path / SAMPLE
        return read_text(path) if os.path.lexists(path) else ""

    def read_model(self) -> tuple[CharacterModel, Vocabulary]:
        """The model, in eval mode on the CPU, and its vocabulary.

        It takes memory only after the file's shapes have been found to be those of a model with
        its hyper-parameters, so never more than the file holds.
        """
        path = self.path / MODEL
        wanted = "a model that charlm saved"
        with TensorFile(path, wanted) as file, blaming(path, wanted):
            about = parse_json(file.metadata["charlm"].encode())
            vocabulary = Vocabulary.checked(about["vocabulary"], about.get("unit", "characters"))
            model = CharacterModel.on_meta(
                len(vocabulary), about["hyperparameters"], len(file.shapes)
            )
            file.check(model.state_dict())
            model = model.to_empty(device="cpu")
            model.load_state_dict(file.read())
        return model.eval(), vocabulary

    @property
    def has_model(self) -> bool:
        return os.path.lexists(self.path / MODEL)

    def size(self) -> int:
        """Bytes of all that lies in the folder itself."""
        return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(self.path))
