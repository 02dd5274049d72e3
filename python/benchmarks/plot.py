"""The plot and the Markdown tables of the README, from results.

    python -m benchmarks.plot results/<machine>-gpu-cuda.json --out speedup.svg

Prints the tables; `--out FILE` draws the speed-up too, as SVG or PNG by the file's name: of the
suites `grid` and `scaling` the curves that they are for, of any other bars for its cases. What is
missing from a result is left out, and a row that failed is shown as such.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks import curves, machine, report
from benchmarks.curves import COLOURS, RATIO
from benchmarks.suites import FORWARD, FORWARD_BACKWARD, SUITES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

SPEED = ("headline", "seeds", "hard")  # suites of a GPU result that the README shows
TABLES = (*SPEED, "memory")
OPTIONS = ("num_layers", "bidirectional", "proj_size", "shortest")


def words(row: dict[str, Any]) -> str:
    """A row's case as a reader says it: "B 36, T 48, I 48, H 96, 2 layers"."""
    if row["T"] == 1:
        sizes = f"one step, B {row['B']}, I {row['I']}, H {row['H']}"
    else:
        sizes = ", ".join(f"{size} {row[size]}" for size in ("B", "T", "I", "H"))
    parts = [sizes]
    if "num_layers" in row:
        parts.append(f"{row['num_layers']} layers")
    if "bidirectional" in row:
        parts.append("both directions")
    if "proj_size" in row:
        parts.append(f"projected to {row['proj_size']}")
    if row.get("shortest") == row["T"]:
        parts.append("packed, equal lengths")
    elif "shortest" in row:
        parts.append(f"packed, lengths {row['shortest']} to {row['T']}")
    return ", ".join(parts)


def main_backend(rows: Rows) -> str | None:
    return next((row["backend"] for row in rows if "backend" in row), None)


def tables(document: dict[str, Any], suites: Iterable[str] = TABLES) -> str:
    """Markdown: one table for a suite's result, one for each of `suites` of a GPU result."""
    if document["benchmark"] == "memory":
        return table(document["rows"], steps=False, memory=True)
    if document["benchmark"] == "lstm":
        more = ["", *curves.slopes(document)] if document["suite"] == "scaling" else []
        return "\n".join([table(document["rows"], steps=False), *more])
    parts = []
    for suite in suites:
        rows = [row for row in document["rows"] if row["suite"] == suite]
        if suite == "memory":  # a case that another suite has too is measured there
            cases = {words(case.facts()) for case in SUITES["memory"].cases}
            rows = [r for r in document["rows"] if "memory_ratio" in r and words(r) in cases]
        if rows:
            parts.append(f"{suite}\n\n{table(rows, steps=True, memory=suite == 'memory')}")
    return "\n\n".join(parts)


def table(rows: Rows, *, steps: bool, memory: bool = False) -> str:
    """Cases against dtypes and passes: the ratio, and with `steps` our microseconds a step; with
    `memory` the ratio of the peaks, ours over nn.LSTM's."""
    main = main_backend(rows)
    columns = list(dict.fromkeys((row["dtype"], row["pass"]) for row in rows))
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        other = f" ({row['backend']})" if row.get("backend", main) != main else ""
        other += f" ({row['threads']} threads)" if "threads" in row else ""
        cells.setdefault(words(row) + other, {})[row["dtype"], row["pass"]] = (
            peak(row) if memory else cell(row, steps)
        )
    heads = [f"{dtype} {pass_.replace('+', ' + ')}" for dtype, pass_ in columns]
    lines = [["case", *heads], ["---"] * (len(columns) + 1)]
    lines += [[case, *(found.get(column, "") for column in columns)]
              for case, found in cells.items()]  # fmt: skip
    return "\n".join(
        "|" + "|".join(line) + "|" if line[0] == "---" else "| " + " | ".join(line) + " |"
        for line in lines
    )


def cell(row: dict[str, Any], steps: bool) -> str:
    if "error" in row:
        return "failed"
    if "ratio" not in row:
        return f"nn.LSTM {row['torch_ms'] * 1e3 / row['T']:.2f} µs"
    ratio = f"{row['ratio']:.2f}"
    return f"{ratio} ({row['fused_ms'] * 1e3 / row['T']:.2f} µs)" if steps else ratio


def peak(row: dict[str, Any]) -> str:
    if "error" in row:
        return "failed"
    return f"{row['memory_ratio']:.2f} ({row['fused_mib']:.0f} of {row['torch_mib']:.0f} MiB)"


def figure(document: dict[str, Any]) -> Figure:
    """Speed-up over nn.LSTM: over the hidden size where that was measured, and for each case."""
    from matplotlib.figure import Figure

    rows = [row for row in document["rows"] if "ratio" in row]
    if not rows:
        raise click.ClickException("there is no row with both times in this result: nothing to see")
    if document["suite"] in ("grid", "scaling"):
        return getattr(curves, document["suite"])(document)
    over_h = [row for row in rows if (row["B"], row["T"]) == (16, 1024) and row["I"] == row["H"]
              and not set(OPTIONS) & row.keys() and "graph" not in row["pass"]]  # fmt: skip
    over_h = over_h if len({row["H"] for row in over_h}) > 1 else []
    main = main_backend(rows)
    shown = [row for row in rows if row.get("suite", "seeds") in SPEED
             and row.get("backend", main) == main and "graph" not in row["pass"]]  # fmt: skip
    passes = [p for p in (FORWARD, FORWARD_BACKWARD) if any(row["pass"] == p for row in over_h)]
    layout: list[Any] = [
        [*([p] if p else []), *(["cases"] if shown else [])] for p in passes or [""]
    ]
    cases = len({words(row) for row in shown})
    size = (4.5 * len(layout[0]) + 1, max(3.6, 0.36 * cases + 1, 3.2 * len(layout)))
    drawing = Figure(figsize=size, layout="constrained")
    axes = drawing.subplot_mosaic(layout)
    for pass_ in passes:
        lines(axes[pass_], [row for row in over_h if row["pass"] == pass_], main)
        axes[pass_].set_title(pass_, fontsize=9)
    if shown:
        bars(axes["cases"], shown)
    where = machine.name(document["machine"])
    drawing.suptitle(f"FusedLSTM: speed-up over nn.LSTM, {where}", fontsize=11)
    return drawing


def lines(axes: Axes, rows: Rows, main: str | None) -> None:
    """The ratio over H at B 16, T 1024; a line for each dtype and backend."""
    for dtype, backend in dict.fromkeys((r["dtype"], r.get("backend", main)) for r in rows):
        ratios = {r["H"]: r["ratio"] for r in rows
                  if (r["dtype"], r.get("backend", main)) == (dtype, backend)}  # fmt: skip
        axes.plot(
            *zip(*sorted(ratios.items()), strict=True),
            color=COLOURS[dtype],
            linestyle="-" if backend == main else ":",
            marker="o",
            markersize=4,
            label=dtype if backend == main else f"{dtype}, {backend}",
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    sizes = sorted({row["H"] for row in rows})
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=7)
    axes.set_xlabel("H (B 16, T 1024, input as large as H)", fontsize=8)
    axes.set_ylabel(RATIO, fontsize=8)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


def bars(axes: Axes, rows: Rows) -> None:
    """The ratio of each case, forward + backward where it was measured; a bar for each dtype, to
    the right of 1 where FusedLSTM is the faster."""
    training = {words(row) for row in rows if row["pass"] == FORWARD_BACKWARD}
    chosen = [r for r in rows if r["pass"] == FORWARD_BACKWARD or words(r) not in training]
    cases = list(dict.fromkeys(words(row) for row in chosen))
    dtypes = list(dict.fromkeys(row["dtype"] for row in chosen))
    thick = 0.8 / len(dtypes)
    for at, dtype in enumerate(dtypes):
        values = {words(row): row["ratio"] for row in chosen if row["dtype"] == dtype}
        places = [cases.index(case) + (at - (len(dtypes) - 1) / 2) * thick for case in values]
        beyond = [value - 1 for value in values.values()]
        axes.barh(places, beyond, thick, left=1, color=COLOURS[dtype], label=dtype)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", linewidth=0.4)
    axes.set_axisbelow(True)
    names = [case if case in training else f"{case} (forward)" for case in cases]
    axes.set_yticks(range(len(cases)), names, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_title(FORWARD_BACKWARD, fontsize=9)
    axes.set_xlabel(RATIO, fontsize=8)
    axes.legend(fontsize=7)


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
@click.argument("results", nargs=-1, required=True,
                type=click.Path(exists=True, dir_okay=False, path_type=Path))  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path),
              help="Draw the speed-up of the first result: FILE.svg or FILE.png.")  # fmt: skip
@click.option("--suite", "suites", multiple=True, default=TABLES, show_default=True,
              help="Of a GPU result. May be repeated.")  # fmt: skip
def main(results: tuple[Path, ...], out: Path | None, suites: tuple[str, ...]) -> None:
    """Print the README's tables from RESULTS, and draw the speed-up."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in results]
    for path, document in zip(results, documents, strict=True):
        if document.get("format") != report.FORMAT:
            raise click.ClickException(f"{path.name} is not a result in format {report.FORMAT}.")
        where, version = machine.name(document["machine"]), document["versions"].get("torch")
        click.echo(f"{where}, torch {version}, commit {document.get('commit')}\n")
        click.echo(tables(document, suites) + "\n")
    if out:
        if out.suffix not in (".svg", ".png"):
            raise click.BadParameter("expected FILE.svg or FILE.png.", param_hint="--out")
        save(figure(documents[0]), out)
        click.echo(f"drawn: {out.name}, {out.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
