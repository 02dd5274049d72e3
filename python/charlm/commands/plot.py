"""charlm plot."""

from pathlib import Path

import click

from charlm import plot
from charlm.commands import FOLDER, names
from charlm.errors import CharlmError
from charlm.runfolder import RunFolder


@click.command("plot")
@click.argument("runs", nargs=-1, required=True, type=FOLDER, metavar="RUN...")
@click.option(
    "--over",
    type=click.Choice(list(plot.OVER)),
    default="steps",
    show_default=True,
    help="What the horizontal axis counts.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="FILE.png or FILE.svg.  [default: loss.png in RUN; of several runs, here]",
)
def plot_command(runs: tuple[Path, ...], over: str, out: Path | None) -> None:
    """Draw the loss and the learning rate of one run or several."""
    records = {}
    for name, path in names(runs).items():
        folder = RunFolder(path)
        folder.read_config()  # which says what is wrong where this is no run
        records[name] = folder.read_metrics()
        if not records[name]:
            raise CharlmError(f"{path} has no metrics yet: train it as far as its first record")
    if out is None:
        out = (runs[0] if len(records) == 1 else Path()) / "loss.png"
    plot.save(plot.figure(records, over), out)
    click.echo(f"wrote {out}")
