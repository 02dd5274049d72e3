"""Loss curves of runs, to be read in black and white: marks and dashes tell lines apart."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from charlm.errors import CharlmError
from charlm.files import write_atomically
from charlm.optimisation import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What the horizontal axis can count: the record's field, and its label.
OVER = {
    "steps": ("step", "optimiser steps"),
    "characters": ("tokens_seen", "characters trained on"),
    "seconds": ("seconds", "seconds of training"),
}
SUFFIXES = (".png", ".svg")
MARKS = "osD^vPX*"
# Their luminances, 0, 35, 55 and 70 %, keep them apart on a printer without colours too.
COLOURS = ("#000000", "#b3400e", "#3f8fd2", "#a9b23a")
MARKS_A_LINE = 9
LARGEST = 1e9  # a loss to draw: at 1e308 matplotlib's ticks overflow
# A run may have any name: no $ in it begins a formula.
SETTINGS: Any = {"svg.hashsalt": "charlm", "svg.fonttype": "none", "text.parse_math": False}


def figure(runs: Mapping[str, Sequence[Record]], over: str = "steps") -> "Figure":
    """Training loss (whole line), validation loss (dashed) and learning rate of runs by name.

    Args:
        runs: the records of each run, at least one.
        over: a key of OVER.

    Raises:
        CharlmError: matplotlib isn't installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise CharlmError(
            'drawing needs matplotlib, which isn\'t installed: pip install "matplotlib>=3.6"'
        ) from None
    with matplotlib.rc_context(SETTINGS):
        drawing = Figure(figsize=(7.2, 5.4), layout="constrained")
        loss, rate = drawing.subplots(2, sharex=True, height_ratios=(3, 1))
        for index, (name, records) in enumerate(runs.items()):
            style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKS[index % len(MARKS)]}
            _curves(loss, rate, records, OVER[over][0], f" {name}" if len(runs) > 1 else "", style)
        _label(loss, rate, OVER[over][1])
        if len(runs) == 1:
            loss.set_title(next(iter(runs)), fontsize=10)
            loss.legend(frameon=False, fontsize=8)
        else:  # of many lines a legend among them would hide some: it is above them
            above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1)}
            loss.legend(frameon=False, fontsize=8, ncols=2, **above)
    return drawing


def _curves(
    loss: "Axes",
    rate: "Axes",
    records: Sequence[Record],
    field: str,
    of_run: str,
    style: Mapping[str, Any],
) -> None:
    """One run's lines; the legend has its lowest validation loss."""
    training = [(getattr(r, field), min(r.train_loss, LARGEST)) for r in records]
    validation = [
        (getattr(r, field), min(r.val_loss, LARGEST)) for r in records if r.val_loss is not None
    ]
    rates = [(getattr(r, field), r.lr) for r in records]
    lowest = f", lowest {min(y for _, y in validation):.3f}" if validation else ""
    dashed = {"linestyle": (0, (4, 2)), "linewidth": 1.7, "markerfacecolor": "white"}
    for axes, points, label, line in (
        (loss, training, f"training{of_run}", {"linewidth": 1.2}),
        (loss, validation, f"validation{of_run}{lowest}", dashed),
        (rate, rates, None, {"linewidth": 1.2}),
    ):
        if points:
            every = max(1, math.ceil(len(points) / MARKS_A_LINE))
            axes.plot(*zip(*points, strict=True), label=label, markersize=5, markevery=every,
                      **style, **line)  # fmt: skip


def _label(loss: "Axes", rate: "Axes", over: str) -> None:
    loss.set_ylabel("loss, nats a character")
    bits = loss.secondary_yaxis(
        "right",
        (lambda nats: np.divide(nats, math.log(2)), lambda bits: np.multiply(bits, math.log(2))),
    )
    bits.set_ylabel("bits a character")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.set_xlabel(over)
    rate.set_xlim(left=0)
    rate.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    for axes in (loss, rate):
        axes.grid(color="0.85", linewidth=0.5)
        axes.spines[["top"]].set_visible(False)


def save(drawing: "Figure", path: Path) -> None:
    """Writes a figure as PNG or SVG, by the name's ending; the same figure as the same bytes.

    Raises:
        CharlmError: another ending, or the file can't be written.
    """
    import matplotlib

    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise CharlmError(f"{path} is neither FILE.png nor FILE.svg: which of them should it be?")
    metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
    data = io.BytesIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # A character that no font has is a box, and a warning for each size of it.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        drawing.savefig(data, format=suffix[1:], dpi=120, metadata=metadata)
    write_atomically(path, data.getvalue())
