"""The commands of charlm, a module each; charlm.cli collects them."""

from pathlib import Path

import click

FOLDER = click.Path(path_type=Path, file_okay=False)  # a run's
