"""charlm presets."""

import click

from charlm.presets import preset_names, read_preset


@click.command("presets")
def presets_command() -> None:
    """List the presets, a line each."""
    names = preset_names()
    width = max(map(len, names))
    for name in names:
        click.echo(f"{name:<{width}}  {read_preset(name)[1]}")
