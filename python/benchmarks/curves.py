"""Curves drawn from a suite's result: the ratio over H and T, and how the times grow."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from benchmarks import machine
from benchmarks.suites import FORWARD, FORWARD_BACKWARD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

COLOURS = {"fp16": "#d95f02", "bf16": "#1b9e77", "fp32": "#7570b3", "tf32": "#e7298a",
           "fp64": "#666666"}  # fmt: skip
STYLES = {FORWARD: ":", FORWARD_BACKWARD: "-"}
RATIO = "time of nn.LSTM / time of FusedLSTM"
SIZES = ("B", "T", "I", "H")
STRAIGHT = 3  # points at the large end that a slope is of


def grid(document: dict[str, Any]) -> Figure:
    """Suite `grid`: the ratio over H and over T, a line for each dtype and pass."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, 3.6), layout="constrained")
    both = drawing.subplots(1, 2, sharey=True)
    for axes, size, fixed in zip(both, ("H", "T"), ("T", "H"), strict=True):
        # What stays the same on this curve has the value that most rows have.
        values = [row[fixed] for row in document["rows"]]
        common = max(set(values), key=values.count)
        rows = [row for row in document["rows"] if row[fixed] == common and "ratio" in row]
        for dtype, pass_ in dict.fromkeys((row["dtype"], row["pass"]) for row in rows):
            points = {
                r[size]: r["ratio"] for r in rows if (r["dtype"], r["pass"]) == (dtype, pass_)
            }
            label = f"{dtype}, {pass_}"
            plot(axes, points, color=COLOURS[dtype], linestyle=STYLES[pass_], label=label)
        axes.axhline(1, color="black", linewidth=0.8)
        ticks(axes, {row[size] for row in rows})
        axes.set_xlabel(f"{size} (B {rows[0]['B']}, {fixed} {common}, input as large as H)",
                        fontsize=8)  # fmt: skip
    both[0].set_ylim(bottom=0)
    both[0].set_ylabel(RATIO, fontsize=8)
    both[1].legend(fontsize=7)
    title(drawing, document, "speed-up over nn.LSTM")
    return drawing


def scaling(document: dict[str, Any]) -> Figure:
    """Suite `scaling`: times over T, B and H on logarithmic axes with the slopes, and the speed-up
    by threads over each. A time in proportion to a size is a line of slope 1, to its square 2."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 6), layout="constrained")
    panels = drawing.subplots(2, 3, sharey="row", height_ratios=(2, 1))
    most = max(row["threads"] for row in document["rows"])
    for at, size in enumerate(("T", "B", "H")):
        rows = [row for row in document["rows"] if row["case"].startswith(f"{size}-")]
        times, threads = panels[0, at], panels[1, at]
        for pass_ in (FORWARD, FORWARD_BACKWARD):
            of = {
                (side, count): {row[size]: row[f"{side}_ms"] for row in rows
                                if (row["pass"], row["threads"]) == (pass_, count)}
                for side in ("torch", "fused") for count in (1, most)
            }  # fmt: skip
            for side, name, colour in (("fused", "FusedLSTM", "#1b9e77"),
                                       ("torch", "nn.LSTM", "#d95f02")):  # fmt: skip
                points, alone = of[side, most], of[side, 1]
                label = f"{name}, {pass_}: slope {slope(points):.2f}"
                style = {"color": colour, "linestyle": STYLES[pass_]}
                plot(times, points, label=label, **style)
                plot(threads, {n: alone[n] / points[n] for n in points}, label=None, **style)
        times.set_yscale("log")
        others = ", ".join(f"{name} {rows[0][name]}" for name in SIZES if name != size)
        times.set_title(f"over {size} ({others})", fontsize=9)
        times.legend(fontsize=6)
        threads.axhline(1, color="black", linewidth=0.8)
        threads.set_xlabel(size, fontsize=8)
        for axes in (times, threads):
            ticks(axes, {row[size] for row in rows})
            axes.grid(linewidth=0.3)
    panels[0, 0].set_ylabel(f"ms a call, {most} threads", fontsize=8)
    panels[1, 0].set_ylabel(f"1 thread / {most} threads", fontsize=8)
    panels[1, 0].set_ylim(0, most + 0.5)
    title(drawing, document, f"time over size, slope of the last {STRAIGHT} points, fp32")
    return drawing


def slope(points: dict[int, float]) -> float:
    """Of log time over log size at the large end, by least squares."""
    last = [(math.log(n), math.log(ms)) for n, ms in sorted(points.items())[-STRAIGHT:]]
    x_mean, y_mean = (sum(values) / len(last) for values in zip(*last, strict=True))
    rise = sum((x - x_mean) * (y - y_mean) for x, y in last)
    return rise / sum((x - x_mean) ** 2 for x, _ in last)


def slopes(document: dict[str, Any]) -> list[str]:
    """The lines of a table: the slope over each size."""
    table = ["| over | pass | threads | FusedLSTM | nn.LSTM |", "|---|---|---|---|---|"]
    for size in ("T", "B", "H"):
        rows = [row for row in document["rows"] if row["case"].startswith(f"{size}-")]
        for pass_, count in dict.fromkeys((row["pass"], row["threads"]) for row in rows):
            same = [row for row in rows if (row["pass"], row["threads"]) == (pass_, count)]
            ours, theirs = (
                slope({r[size]: r[f"{side}_ms"] for r in same}) for side in ("fused", "torch")
            )
            table.append(f"| {size} | {pass_} | {count} | {ours:.2f} | {theirs:.2f} |")
    return table


def plot(axes: Axes, points: dict[int, float], **style: Any) -> None:
    axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", markersize=3, **style)


def ticks(axes: Axes, values: Iterable[int]) -> None:
    """A logarithmic axis that names the sizes which were measured."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(values), [f"{n:,}" for n in sorted(values)], fontsize=7)
    axes.minorticks_off()


def title(drawing: Figure, document: dict[str, Any], words: str) -> None:
    where = machine.name(document["machine"])
    threads = "" if document["device"] != "cpu" else f", {document['threads']} threads"
    drawing.suptitle(f"FusedLSTM: {words}, {where}{threads}", fontsize=10)
