"""charlm compare."""

from pathlib import Path

import click

from charlm.commands import FOLDER, names
from charlm.results import columns, facts, results, settings, table
from charlm.runfolder import RunFolder


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, type=FOLDER, metavar="RUN RUN...")
def compare_command(runs: tuple[Path, ...]) -> None:
    """Print what the settings of runs differ in, and what came of each."""
    folders = {name: RunFolder(path) for name, path in names(runs).items()}
    if len(folders) < 2:
        raise click.UsageError("give two runs or more; charlm show prints one")
    given = {name: settings(folder.read_config()) for name, folder in folders.items()}
    texts = {name: facts(folder.read_facts()) for name, folder in folders.items()}
    came = {name: results(folder.read_metrics()) for name, folder in folders.items()}
    head = ["", *folders]
    different = columns(given, only_different=True) + columns(texts, only_different=True)
    click.echo(table([head, *different, ["", *("" for _ in folders)], *columns(came)]))
