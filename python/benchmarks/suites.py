"""What is measured: a suite is a list of cases and the dtypes it is run in by default.

A new suite is a new entry of `SUITES`; nothing else has to change.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

FORWARD = "forward"  # eval mode, no gradient wanted
FORWARD_BACKWARD = "forward+backward"  # the loss is the sum of the output


@dataclass(frozen=True)
class Case:
    """One LSTM and one input of shape (T, B, input_size), with the states (h_0, c_0) given."""

    name: str
    B: int  # sequences in a batch
    T: int  # steps
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    passes: tuple[str, ...] = (FORWARD, FORWARD_BACKWARD)

    def options(self) -> dict[str, Any]:
        """The arguments of nn.LSTM, beyond the two sizes, that are not at their default."""
        options = ("num_layers", "bidirectional", "proj_size")
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in options and getattr(self, field.name) != field.default
        }


@dataclass(frozen=True)
class Suite:
    cases: tuple[Case, ...]
    dtypes: tuple[str, ...]  # names in lstm.DTYPES


SUITES: dict[str, Suite] = {
    # The sizes of the documents the project grew from; one step is what sampling a character costs.
    "seeds": Suite(
        cases=(
            Case("frankenstein", B=36, T=48, input_size=48, hidden_size=96),
            Case("sonnets", B=128, T=100, input_size=61, hidden_size=512),
            Case("tinyshakespeare", B=32, T=64, input_size=64, hidden_size=256),
            Case("one-step-96", B=1, T=1, input_size=48, hidden_size=96, passes=(FORWARD,)),
            Case("one-step-512", B=1, T=1, input_size=61, hidden_size=512, passes=(FORWARD,)),
        ),
        dtypes=("fp32", "bf16"),
    ),
}
