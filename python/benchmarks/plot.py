"""The plot and the Markdown tables of the README, from results.

    python -m benchmarks.plot results/<machine>-grid-cpu.json --out grid.svg

Prints the tables; `--out FILE` draws the curves too that the suites `grid` and `scaling` are for,
as SVG or PNG by the file's name. A row that failed is shown as such.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks import machine, report
from benchmarks.suites import FORWARD, FORWARD_BACKWARD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

SUITES = ("headline", "seeds", "hard")  # of a GPU result that the README shows
RATIO = "{ratio:.2f}"
SPEED = "{ratio:.2f} ({fused_us_per_step:.2f} µs)"
PEAK = "{memory_ratio:.2f} ({fused_mib:.0f} of {torch_mib:.0f} MiB)"
COLOURS = {"bf16": "#1b9e77", "fp32": "#7570b3"}
STYLES = {FORWARD: ":", FORWARD_BACKWARD: "-"}
STRAIGHT = 3  # points at the large end that a slope is of


def words(row: dict[str, Any]) -> str:
    """A row's case as a reader says it: "B 36, T 48, I 48, H 96, 2 layers"."""
    one_step = row["T"] == 1
    parts = ["one step"] if one_step else []
    parts += [f"{size} {row[size]}" for size in ("BIH" if one_step else "BTIH")]
    forms = {"num_layers": "{} layers", "bidirectional": "both directions",
             "proj_size": "projected to {}", "shortest": "packed, lengths {} to {T}"}  # fmt: skip
    parts += [form.format(row[key], **row) for key, form in forms.items() if key in row]
    return ", ".join(parts).replace(f"lengths {row['T']} to {row['T']}", "equal lengths")


def tables(document: dict[str, Any]) -> str:
    """Markdown: one table for a suite's result; of a GPU result one for each of SUITES, and
    one of peak memory."""
    rows = document["rows"]
    if document["benchmark"] != "gpu":
        cell = RATIO if any("ratio" in row for row in rows) else PEAK
        slopes = table_of_slopes(rows) if document["suite"] == "scaling" else []
        return "\n".join([table(rows, cell), *slopes])
    of_suites = [(suite, [r for r in rows if r["suite"] == suite], SPEED) for suite in SUITES]
    parts = [*of_suites, ("memory", [r for r in rows if "memory_ratio" in r], PEAK)]
    return "\n\n".join(f"{suite}\n\n{table(of, cell)}" for suite, of, cell in parts if of)


def table(rows: Rows, cell: str) -> str:
    """Cases against dtypes and passes."""
    main = next((row["backend"] for row in rows if "backend" in row), None)
    columns = list(dict.fromkeys((row["dtype"], row["pass"]) for row in rows))
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        other = f" ({row['backend']})" if row.get("backend", main) != main else ""
        for key in ("threads", "busy"):
            other += f" ({row[key]} {key})" if key in row else ""
        found = "failed" if "error" in row else cell.format_map(row)
        cells.setdefault(words(row) + other, {})[row["dtype"], row["pass"]] = found
    heads = [f"{dtype} {pass_.replace('+', ' + ')}" for dtype, pass_ in columns]
    lines = [[case, *(of.get(column, "") for column in columns)] for case, of in cells.items()]
    rule = "|".join(["", *["---"] * (len(columns) + 1), ""])
    first, *others = (f"| {' | '.join(line)} |" for line in [["case", *heads], *lines])
    return "\n".join([first, rule, *others])


def slope(points: dict[int, float]) -> float:
    """Of log time over log size at the large end, by least squares."""
    last = sorted(points.items())[-STRAIGHT:]
    sizes, ms = np.log(last).T
    return float(np.polyfit(sizes, ms, 1)[0])


def times(rows: Rows, side: str, size: str, pass_: str, threads: int) -> dict[int, float]:
    """Of suite `scaling`: a side's milliseconds over a size."""
    return {row[size]: row[f"{side}_ms"] for row in rows if row["case"].startswith(f"{size}-")
            and (row["pass"], row["threads"]) == (pass_, threads)}  # fmt: skip


def table_of_slopes(rows: Rows) -> list[str]:
    lines = ["", "| over | pass | threads | FusedLSTM | nn.LSTM |", "|---|---|---|---|---|"]
    for size in "TBH":
        for which in dict.fromkeys((row["pass"], row["threads"]) for row in rows):
            ours, theirs = (slope(times(rows, side, size, *which)) for side in ("fused", "torch"))
            pass_, threads = which
            lines.append(f"| {size} | {pass_} | {threads} | {ours:.2f} | {theirs:.2f} |")
    return lines


def figure(document: dict[str, Any]) -> Figure:
    from matplotlib.figure import Figure

    if document["suite"] not in ("grid", "scaling"):
        raise click.ClickException("curves are of the suites grid and scaling.")
    rows = [row for row in document["rows"] if "ratio" in row]
    drawing = Figure(layout="constrained")
    title = {"grid": grid, "scaling": scaling}[document["suite"]](drawing, rows)
    threads = "" if document["device"] != "cpu" else f", {document['threads']} threads"
    where = machine.name(document["machine"])
    drawing.suptitle(f"FusedLSTM: {title}, {where}{threads}", fontsize=10)
    return drawing


def grid(drawing: Figure, rows: Rows) -> str:
    """Suite `grid`: the ratio over H and over T, a line for each dtype and pass."""
    drawing.set_size_inches(9, 3.6)
    both = drawing.subplots(1, 2, sharey=True)
    for axes, size, fixed in zip(both, "HT", "TH", strict=True):
        # What stays the same on this curve has the value that most rows have.
        values = [row[fixed] for row in rows]
        common = max(set(values), key=values.count)
        same = [row for row in rows if row[fixed] == common]
        for dtype, pass_ in dict.fromkeys((row["dtype"], row["pass"]) for row in same):
            of = [row for row in same if (row["dtype"], row["pass"]) == (dtype, pass_)]
            points = {row[size]: row["ratio"] for row in of}
            curve(axes, points, f"{dtype}, {pass_}", COLOURS[dtype], pass_)
        axes.axhline(1, color="black", linewidth=0.8)
        where = f"{size} (B {same[0]['B']}, {fixed} {common}, input as large as H)"
        axes.set_xlabel(where, fontsize=8)
    both[0].set_ylim(bottom=0)
    both[0].set_ylabel("time of nn.LSTM / time of FusedLSTM", fontsize=8)
    both[1].legend(fontsize=7)
    return "speed-up over nn.LSTM"


def scaling(drawing: Figure, rows: Rows) -> str:
    """Suite `scaling`: times over T, B and H on logarithmic axes with the slopes, and the speed-up
    by threads over each. A time in proportion to a size is a line of slope 1, to its square 2."""
    drawing.set_size_inches(11, 6)
    panels = drawing.subplots(2, 3, sharey="row", height_ratios=(2, 1))
    most = max(row["threads"] for row in rows)
    for at, size in enumerate("TBH"):
        above, below = panels[:, at]
        above.set_yscale("log")
        for pass_ in (FORWARD, FORWARD_BACKWARD):
            for side, name, colour in (("fused", "FusedLSTM", "#1b9e77"),
                                       ("torch", "nn.LSTM", "#d95f02")):  # fmt: skip
                alone, points = (times(rows, side, size, pass_, n) for n in (1, most))
                curve(above, points, f"{name}, {pass_}: slope {slope(points):.2f}", colour, pass_)
                curve(below, {n: alone[n] / points[n] for n in points}, None, colour, pass_)
        first = next(row for row in rows if row["case"].startswith(f"{size}-"))
        others = ", ".join(f"{name} {first[name]}" for name in "BTIH" if name != size)
        above.set_title(f"over {size} ({others})", fontsize=9)
        above.legend(fontsize=6)
        below.axhline(1, color="black", linewidth=0.8)
        below.set_xlabel(size, fontsize=8)
        for axes in (above, below):
            axes.grid(linewidth=0.3)
    panels[0, 0].set_ylabel(f"ms a call, {most} threads", fontsize=8)
    panels[1, 0].set_ylabel(f"1 thread / {most} threads", fontsize=8)
    panels[1, 0].set_ylim(0, most + 0.5)
    return f"time over size, slope of the last {STRAIGHT} points, fp32"


def curve(axes: Axes, points: dict[int, float], label: str | None, colour: str, pass_: str) -> None:
    """A line over a logarithmic axis that names the sizes which were measured."""
    sizes = sorted(points)
    axes.plot(sizes, [points[n] for n in sizes], marker="o", markersize=3, label=label,
              color=colour, linestyle=STYLES[pass_])  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes], fontsize=7)
    axes.minorticks_off()


def save(drawing: Figure, path: Path) -> None:
    """The same bytes from the same result: no date, no random names. 64 colours are a third of a
    PNG's size."""
    import matplotlib
    from PIL import Image

    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "fused_lstm", "svg.fonttype": "none"}):
        drawing.savefig(path, dpi=90, metadata=metadata)
    if path.suffix == ".png":
        with Image.open(path) as picture:
            few = picture.convert("RGB").quantize(64)
        few.save(path, optimize=True)


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="FILE.svg or FILE.png to draw.")
def main(results: tuple[Path, ...], out: Path | None) -> None:
    """Print the README's tables from RESULTS, and draw the first."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    for path, document in zip(results, documents, strict=True):
        if document.get("format") != report.FORMAT:
            raise click.ClickException(f"{path.name} is not a result in format {report.FORMAT}.")
        where, version = machine.name(document["machine"]), document["versions"].get("torch")
        click.echo(f"{where}, torch {version}, commit {document.get('commit')}\n")
        click.echo(tables(document) + "\n")
    if out:
        if out.suffix not in (".svg", ".png"):
            raise click.BadParameter("expected FILE.svg or FILE.png.", param_hint="--out")
        save(figure(documents[0]), out)
        click.echo(f"drawn: {out.name}, {out.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
