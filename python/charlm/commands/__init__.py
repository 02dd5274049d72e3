"""The commands of charlm, a module each; charlm.cli collects them."""

from pathlib import Path

import click

FOLDER = click.Path(path_type=Path, file_okay=False)  # a run's


def names(runs: tuple[Path, ...]) -> dict[str, Path]:
    """Runs by the names to show: the folder's own, the whole path where two have the same."""
    short = [path.resolve().name for path in runs]
    return {
        name if short.count(name) == 1 else str(path): path
        for name, path in zip(short, runs, strict=True)
    }
