"""charlm show."""

from pathlib import Path

import click

from charlm.commands import FOLDER
from charlm.reading import printable
from charlm.results import facts, results, settings, table
from charlm.runfolder import RunFolder


@click.command("show")
@click.argument("run", type=FOLDER)
def show_command(run: Path) -> None:
    """Print the settings of RUN, its size, its best loss and its last sample."""
    folder = RunFolder(run)
    parts = {
        "settings": settings(folder.read_config()),
        "facts": facts(folder.read_facts()),
        "size": {"bytes": f"{folder.size():,}"},
        "results": results(folder.read_metrics()),
    }
    if folder.has_model:  # a run that has just begun has none
        parts["size"] |= {"parameters": f"{folder.read_model()[0].parameter_count():,}"}
    written = folder.read_sample()
    width = max(len(name) for part in parts.values() for name in part)
    for title, part in parts.items():
        click.echo(f"{title}\n" + table([[f"  {k}".ljust(width + 2), v] for k, v in part.items()]))
    click.echo(f"sample\n{printable(written)}" if written else "no sample yet")
