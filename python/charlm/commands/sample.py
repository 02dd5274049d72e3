"""charlm sample."""

from pathlib import Path
from typing import Any

import click

from charlm.commands import FOLDER
from charlm.runfolder import RunFolder
from charlm.sampling import sample_by
from charlm.training import device_of


@click.command("sample")
@click.argument("folder", type=FOLDER)
@click.option("--prompt", help="Text to go on from.  [default: the run's]")
@click.option("--length", type=int, help="Characters to draw.  [default: the run's]")
@click.option(
    "--temperature",
    type=float,
    help="Below 1 bolder, above 1 wilder; 0 is the likeliest.  [default: the run's]",
)
@click.option("--top-k", type=int, help="Draw among the k likeliest characters only.")
@click.option(
    "--top-p",
    type=float,
    help="Draw among the fewest characters that together have this probability.",
)
@click.option("--seed", type=int, help="The same seed draws the same text.  [default: the run's]")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ..., auto.")
def sample_command(folder: Path, device: str, **overrides: Any) -> None:
    """Print text from the run in FOLDER."""
    run = RunFolder(folder)
    config = run.read_config().override(overrides)
    model, vocabulary = run.read_model()
    model.to(device_of(device))
    click.echo(sample_by(config, model, vocabulary, config.length, config.seed))
