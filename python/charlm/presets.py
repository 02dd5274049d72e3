"""Everything that decides a run, and the named recipes."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from charlm.errors import CharlmError

_POSITIVE = (
    "window",
    "stride",
    "batch_size",
    "hidden",
    "layers",
    "eval_every",
    "threads",
    "lr",
    "epochs",
    "steps",
    "clip",
)
_NOT_NEGATIVE = ("embedding", "weight_decay")
_FRACTION = ("validation", "dropout", "warmup")
_CHOICES = {
    "batches": ("rows", "windows"),
    "optimizer": ("adam", "adamw"),
    "schedule": ("constant", "cosine"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a run. Exactly one of `epochs` and `steps` says how long it is.

    Raises:
        CharlmError: a value outside its range.
    """

    preset: str
    # text
    file: str | None = None  # its own text's file name; None trains on the built-in text
    characters: tuple[int, int] | None = None  # the part of the text that is used: [first, end)
    opening: str = ""  # how that part begins; anything else is another edition
    validation: float = 0.0  # fraction held out at the end
    # batches
    batches: str = "rows"  # "rows": contiguous, states carried; "windows": shuffled, zero states
    window: int = 64  # T
    stride: int = 1  # from window to window, for "windows"
    batch_size: int = 32  # B
    # model
    cell: str = "fused"
    embedding: int = 64  # 0: one-hot
    hidden: int = 256
    layers: int = 1
    dropout: float = 0.0
    # optimisation
    optimizer: str = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: float = 0.0  # fraction of the run over which the learning rate rises linearly
    clip: float | None = None  # largest gradient norm
    epochs: int | None = None
    steps: int | None = None
    eval_every: int | None = None  # steps from record to record; None: one an epoch
    # sample
    prompt: str | None = None  # None: the text's first word
    length: int = 500
    temperature: float = 0.8
    # where
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None  # None: what torch chooses

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise CharlmError("give one of epochs and steps, not both")
        for name, right, wanted in (
            *((name, lambda value: 0 < value < math.inf, "positive") for name in _POSITIVE),
            *((name, lambda value: 0 <= value < math.inf, "at least 0") for name in _NOT_NEGATIVE),
            *((name, lambda value: 0 <= value < 1, "at least 0 and below 1") for name in _FRACTION),
            ("seed", lambda value: 0 <= value < 2**32, "at least 0 and below 2**32"),
        ):
            value = getattr(self, name)
            if value is not None and not right(value):
                raise CharlmError(f"{name.replace('_', '-')} must be {wanted}, got {value}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise CharlmError(f"{name} must be one of {', '.join(choices)}")

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
        """Raises TypeError for names that aren't settings, CharlmError for values."""
        characters = values.get("characters")
        return cls(**{**values, "characters": tuple(characters) if characters else None})


PRESETS = {
    preset.preset: preset
    for preset in (
        Config(
            preset="default",
            validation=0.1,
            # Contiguous rows with carried states end at a validation loss of 1.160, shuffled
            # windows with zero states at 1.167 (4,000 steps). Without dropout either overfits
            # from step 2,000 on, at 1.20. 2,400 steps take about a minute on 2 cores and end at
            # 1.184.
            batches="rows",
            dropout=0.2,
            schedule="cosine",
            warmup=0.025,
            clip=1.0,
            steps=2400,
            eval_every=250,
        ),
        # "Train the LSTM" (notebook 05 of a PyTorch course on Frankenstein's first letter)
        Config(
            preset="frankenstein",
            file="frankenstein.txt",
            characters=(1380, 8230),
            opening="Letter 1",
            batches="windows",
            window=48,
            stride=1,
            batch_size=36,
            embedding=48,
            hidden=96,
            optimizer="adam",
            lr=0.015,
            epochs=5,
            prompt="You will rejoice to hear",
        ),
    )
}
