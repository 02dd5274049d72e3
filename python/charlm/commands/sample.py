"""charlm sample."""

import time
from pathlib import Path
from typing import Any

import click

from charlm.commands import FOLDER
from charlm.errors import CharlmError
from charlm.interrupt import Interrupt
from charlm.runfolder import RunFolder
from charlm.sampling import WEIGHTS, Writer, choice_of
from charlm.training import device_of

FROM_FILE = "FILE:"


@click.command("sample")
@click.argument("folder", type=FOLDER)
@click.option("--prompt", help="Text to go on from; FILE:PATH is a file's.  [default: the run's]")
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
@click.option("--samples", "texts", type=click.IntRange(1), default=1, help="Texts, side by side.")
@click.option("--stop", default="", metavar="TEXT", help="A text ends behind it.")
@click.option("--interactive", is_flag=True, help="Type, and the text goes on from there.")
@click.option("--weights", type=click.Choice(list(WEIGHTS)), help="Kept narrower: faster.")
@click.option("--stats", is_flag=True, help="Say how many characters a second were drawn.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ..., auto.")
def sample_command(
    folder: Path,
    device: str,
    texts: int,
    stop: str,
    interactive: bool,
    weights: str | None,
    stats: bool,
    **overrides: Any,
) -> None:
    """Print text from the run in FOLDER."""
    if interactive and texts > 1:
        raise click.UsageError("--interactive goes on with one text: leave --samples out.")
    run = RunFolder(folder)
    config = run.read_config().override(overrides)
    model, vocabulary = run.read_model()
    model.to(device_of(device))
    writer = Writer(model, vocabulary, texts, weights=weights, **choice_of(config))
    show = Show(writer, config.length, stop, stats)
    prompt = prompt_of(str(config.prompt))
    if texts > 1:
        show.all(prompt, texts)
    elif interactive:
        if overrides["prompt"]:
            show.one(prompt)
        converse(show)
    elif show.one(prompt):
        raise click.exceptions.Exit(130)  # what shells expect after Ctrl-C


def prompt_of(given: str) -> str:
    if not given.startswith(FROM_FILE):
        return given
    path = given.removeprefix(FROM_FILE)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise CharlmError(f"cannot read the prompt in {path}: {error}") from None


class Show:
    """Draws and prints, with what the command's options say."""

    def __init__(self, writer: Writer, length: int, stop: str, stats: bool) -> None:
        self._writer, self._stats = writer, stats
        self._length, self._stop = length, stop

    def one(self, prompt: str, echo: bool = True) -> bool:
        """As it is drawn; whether Ctrl-C has ended it."""
        count, began = 0, time.perf_counter()
        pieces = self._writer.write(prompt, self._length, self._stop)
        shown = prompt if echo else ""
        with Interrupt() as interrupt:
            for (text,) in pieces:
                click.echo(shown + text, nl=False)
                shown = ""
                count += len(text)
                if interrupt.asked:
                    break
        click.echo(shown)
        self._rate(count, began)
        return interrupt.asked

    def all(self, prompt: str, texts: int) -> None:
        """One below the other, each when all are drawn."""
        began = time.perf_counter()
        pieces = list(self._writer.write(prompt, self._length, self._stop))
        drawn = ["".join(of) for of in zip(*pieces, strict=True)] or [""] * texts
        for number, text in enumerate(drawn, 1):
            click.echo(f"--- {number} of {texts} ---\n{prompt}{text}")
        self._rate(sum(map(len, drawn)), began)

    def _rate(self, count: int, began: float) -> None:
        if self._stats:
            seconds = time.perf_counter() - began
            rate = f"{count / seconds:,.0f} characters a second"
            click.echo(f"{count:,} characters in {seconds:.3f} s: {rate}", err=True)


def converse(show: Show) -> None:
    """Takes lines of text until the end of input, and prints what comes after each."""
    click.echo("Type, and the text goes on; Ctrl-C ends a text, Ctrl-D all.", err=True)
    while True:
        try:
            show.one(input("> "), echo=False)
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:  # amid a line, or for the second time amid a text
            click.echo()
        except CharlmError as error:
            click.echo(f"Error: {error}", err=True)
