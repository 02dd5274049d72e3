"""The command line: what all commands share. Each command is a module of charlm.commands."""

import sys
from typing import Any

import click

from charlm.commands.compare import compare_command
from charlm.commands.eval import eval_command
from charlm.commands.plot import plot_command
from charlm.commands.presets import presets_command
from charlm.commands.sample import sample_command
from charlm.commands.show import show_command
from charlm.commands.train import train
from charlm.errors import CharlmError


class Group(click.Group):
    """Shows a CharlmError as click shows its own: one line, exit status 1."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except CharlmError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Train character-level language models and sample from them."""
    # A terminal that can't show a character shows a question mark instead of ending the run.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


main.add_command(train)
main.add_command(sample_command)
main.add_command(eval_command)
main.add_command(plot_command)
main.add_command(show_command)
main.add_command(compare_command)
main.add_command(presets_command)
