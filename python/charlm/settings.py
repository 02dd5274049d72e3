"""Everything that decides a run: each setting with its group, its help, its default and range.

The options of `charlm train`, the tables of a preset's TOML file and the checks all follow from
the fields of Config.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from charlm.errors import CharlmError
from charlm.loglines import LOG_LINES, SAMPLE_TIMES
from charlm.model import CELLS, INITIAL_WEIGHTS
from charlm.optimisation import OPTIMIZERS, SCHEDULES, STOP_RULES

GROUPS = ("text", "batches", "model", "optimisation", "output", "run")


@dataclass(frozen=True)
class Range:
    """Which values a setting takes, in words and as a test."""

    words: str
    low: float
    low_too: bool = True
    high: float = math.inf
    high_too: bool = False

    def holds(self, value: float) -> bool:
        above = self.low <= value if self.low_too else self.low < value
        return above and (value <= self.high if self.high_too else value < self.high)


POSITIVE = Range("positive", 0, low_too=False)
NOT_NEGATIVE = Range("at least 0", 0)
FRACTION = Range("at least 0 and below 1", 0, high=1)
UPTO_ONE = Range("above 0 and at most 1", 0, low_too=False, high=1, high_too=True)
SEED = Range("at least 0 and below 2**32", 0, high=2**32)


def _setting(default: Any, group: str, help: str, allowed: Any = None) -> Any:
    """A field of Config; `allowed` is a Range or a collection of names."""
    return dataclasses.field(
        default=default, metadata={"group": group, "help": help, "allowed": allowed}
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a run. Exactly one of `epochs` and `steps` says how long it is.

    Raises:
        CharlmError: a value outside its range.
    """

    preset: str
    # What comes first in a group comes first in the help.
    file: str | None = _setting(None, "text", "The preset's own text; --text takes its place.")
    validation: float = _setting(0.0, "text", "Fraction held out for validation.", FRACTION)
    test: float = _setting(0.0, "text", "Fraction held out at the end for charlm eval.", FRACTION)
    vocabulary: str = _setting(
        "characters", "text", "What an id stands for.", ("characters", "bytes")
    )
    characters: tuple[int, int] | None = _setting(
        None, "text", "Use characters FIRST to END (excluded) only."
    )
    opening: str = _setting("", "text", "How the text should begin; says so where it doesn't.")

    batch_size: int = _setting(32, "batches", "Windows in a batch.", POSITIVE)
    window: int = _setting(64, "batches", "Characters in a window.", POSITIVE)
    accumulate: int = _setting(
        1,
        "batches",
        "Parts that a batch's rows are taken in, one after the other, for less memory.",
        POSITIVE,
    )
    batches: str = _setting(
        "rows",
        "batches",
        "rows: contiguous, the state carried and detached; windows: shuffled, zero states.",
        ("rows", "windows"),
    )
    stride: int = _setting(1, "batches", "From window to window, for windows.", POSITIVE)

    hidden: int = _setting(256, "model", "Units in a layer.", POSITIVE)
    layers: int = _setting(1, "model", "Recurrent layers.", POSITIVE)
    embedding: int = _setting(
        64, "model", "Width of a character's embedding; 0 is one-hot.", NOT_NEGATIVE
    )
    dropout: float = _setting(0.0, "model", "Between layers and before the linear layer.", FRACTION)
    cell: str = _setting(
        "fused", "model", "fused_lstm.FusedLSTM, or torch's LSTM, GRU or RNN.", tuple(CELLS)
    )
    biases: int = _setting(
        2, "model", "Bias vectors of a layer: torch's two, or one.", Range("1 or 2", 1, high=3)
    )
    initial: str = _setting(
        "torch",
        "model",
        "Recurrent weights: torch's uniform ones, or Xavier's with zero biases.",
        tuple(INITIAL_WEIGHTS),
    )

    epochs: int | None = _setting(None, "optimisation", "Passes over the text.", POSITIVE)
    steps: int | None = _setting(
        None, "optimisation", "Optimiser steps, in place of --epochs.", POSITIVE
    )
    lr: float = _setting(3e-3, "optimisation", "Learning rate.", POSITIVE)
    dtype: str = _setting(
        "float32",
        "optimisation",
        "Of the products; weights, their update and the loss stay in float32.",
        ("float32", "bfloat16"),
    )
    compile: bool = _setting(
        False, "optimisation", "The model's other operators by torch.compile, which takes a minute."
    )
    optimizer: str = _setting("adamw", "optimisation", "The update.", tuple(OPTIMIZERS))
    schedule: str = _setting(
        "constant",
        "optimisation",
        "Of the learning rate: decay multiplies it by --decay each pass, plateau where the loss "
        "has not improved for --patience records.",
        tuple(SCHEDULES),
    )
    warmup: float = _setting(
        0.0, "optimisation", "Fraction of the run in which the learning rate rises.", FRACTION
    )
    decay: float = _setting(0.99, "optimisation", "Factor of decay and plateau.", UPTO_ONE)
    patience: int = _setting(
        10, "optimisation", "Records without improvement, for plateau and stop.", POSITIVE
    )
    weight_decay: float = _setting(0.0, "optimisation", "Of the optimiser.", NOT_NEGATIVE)
    clip: float = _setting(
        0.0, "optimisation", "Largest norm of the gradient; 0: any.", NOT_NEGATIVE
    )
    stop: str = _setting(
        "never",
        "optimisation",
        "Early: below stops at a mean training loss under --stop-below, patience after "
        "--patience records without improvement.",
        tuple(STOP_RULES),
    )
    stop_below: float = _setting(0.05, "optimisation", "For --stop below.", NOT_NEGATIVE)

    prompt: str | None = _setting(None, "output", "Of the samples.  [default: the first word]")
    length: int = _setting(500, "output", "Characters of the sample at the end.", NOT_NEGATIVE)
    temperature: float = _setting(
        0.8, "output", "Below 1 bolder, above 1 wilder; 0 is the likeliest.", NOT_NEGATIVE
    )
    top_k: int = _setting(0, "output", "Draw among the k likeliest only; 0: all.", NOT_NEGATIVE)
    top_p: float = _setting(
        1.0, "output", "Draw among the fewest that have this probability.", UPTO_ONE
    )
    eval_every: int = _setting(
        0, "output", "Steps from record to record; 0: one an epoch.", NOT_NEGATIVE
    )
    eval_from: int = _setting(
        0, "output", "Step of the first record; 0: --eval-every.", NOT_NEGATIVE
    )
    eval_batches: int = _setting(
        0, "output", "Batches that an evaluation takes; 0: all.", NOT_NEGATIVE
    )
    eval_train: bool = _setting(
        False, "output", "Evaluate the training loss too, instead of averaging the steps'."
    )
    log: str = _setting("plain", "output", "The line that shows a record.", tuple(LOG_LINES))
    log_every: int = _setting(1, "output", "Records from shown one to shown one.", POSITIVE)
    samples: str = _setting("end", "output", "When a sample is drawn.", tuple(SAMPLE_TIMES))
    sample_length: int = _setting(
        70, "output", "Characters of the samples while training.", NOT_NEGATIVE
    )
    preview: int = _setting(
        0, "output", "Characters and ids of the text to show; 0: none.", NOT_NEGATIVE
    )
    headings: bool = _setting(False, "output", "Show data, model, training, generation apart.")

    seed: int = _setting(0, "run", "Of weights, batches, dropout and sample.", SEED)
    device: str = _setting("cpu", "run", "cpu, cuda, cuda:1, ...; auto is cuda where it is there.")
    threads: int | None = _setting(None, "run", "CPU threads.  [default: torch's]", POSITIVE)
    fsdp: bool = _setting(
        False,
        "run",
        "Several processes keep a share of the weights each, for models beyond one GPU.",
    )
    checkpoint_every: int = _setting(
        0,
        "run",
        "Steps from checkpoint to checkpoint; 0: as often as costs 1 % of the time.",
        NOT_NEGATIVE,
    )

    def __post_init__(self) -> None:
        for field in settings():
            _check(field, getattr(self, field.name))
        if (self.epochs is None) == (self.steps is None):
            raise CharlmError("give one of epochs and steps, not both")
        if self.validation + self.test >= 1:
            raise CharlmError(
                f"validation {self.validation:g} and test {self.test:g} leave nothing to train on"
            )

    def override(self, values: Mapping[str, Any]) -> "Config":
        """The same settings with those values that aren't None in place of its own."""
        given = {name: value for name, value in values.items() if value is not None}
        # How long a run is, is one setting with two units.
        if "steps" in given or "epochs" in given:
            given = {"steps": None, "epochs": None} | given
        return dataclasses.replace(self, **given)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Config":
        """Raises CharlmError for names that aren't settings, for types and for values."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        given: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                raise CharlmError(f"there is no setting {name}")
            if value is None:
                continue
            if name == "characters":
                value = _pair(value)
            kind = setting_type(known[name])
            # bool is an int to Python, and an int will do for a float.
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise CharlmError(f"{name} must be {_KINDS[kind]}, got {value!r}")
            given[name] = value
        if "preset" not in given:
            raise CharlmError("the setting preset is missing")
        return cls(**given)


_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    tuple: "a pair [FIRST, END]",
}


def _pair(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and [type(item) for item in value] == [int, int]:
        return tuple(value)
    return value


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    allowed, name = field.metadata["allowed"], field.name.replace("_", "-")
    if field.name == "characters" and value is not None and not 0 <= value[0] < value[1]:
        raise CharlmError(f"characters must be FIRST below END, got {value[0]} and {value[1]}")
    if value is None or allowed is None:
        return
    if isinstance(allowed, Range):
        if not allowed.holds(value):
            raise CharlmError(f"{name} must be {allowed.words}, got {value}")
    elif value not in allowed:
        raise CharlmError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def settings() -> list[dataclasses.Field[Any]]:
    """The fields of Config that are settings: all but the preset's name."""
    return [field for field in dataclasses.fields(Config) if "group" in field.metadata]


def setting_type(field: dataclasses.Field[Any]) -> type:
    """int, float, str, bool or tuple."""
    hint = typing.get_type_hints(Config)[field.name]
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_origin(hint) or hint
