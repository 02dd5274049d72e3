"""charlm train."""

from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from charlm.commands import FOLDER
from charlm.corpus import DATA_FOLDER, Vocabulary, excerpt, read_text
from charlm.evaluation import bits_per_character, perplexity
from charlm.interrupt import Interrupt
from charlm.model import CELLS
from charlm.presets import PRESETS
from charlm.runfolder import RunFolder, check_free
from charlm.sampling import sample
from charlm.training import Record, Trainer


@click.command("train")
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="default",
    show_default=True,
    help="The recipe; the options below change single settings of it.",
)
@click.option(
    "--text",
    metavar="FILE|-",
    help="Text to train on, UTF-8; - reads standard input. Without it: the preset's own "
    f"text in the folder that {DATA_FOLDER} names, or the built-in corpus.",
)
@click.option("--run", "run", type=FOLDER, help="Folder to write.  [default: runs/PRESET-N]")
@click.option("--seed", type=int, help="Of weights, batches, dropout and sample.")
@click.option("--cell", type=click.Choice(CELLS), help="fused_lstm.FusedLSTM or torch.nn.LSTM.")
@click.option("--epochs", type=int, help="Passes over the text.")
@click.option("--steps", type=int, help="Optimiser steps, in place of --epochs.")
@click.option("--batch-size", type=int, help="Windows in a batch.")
@click.option("--window", type=int, help="Characters in a window.")
@click.option("--hidden", type=int, help="Units in a layer.")
@click.option("--layers", type=int, help="Recurrent layers.")
@click.option("--embedding", type=int, help="Width of a character's embedding; 0 is one-hot.")
@click.option("--dropout", type=float, help="Between layers and before the linear layer.")
@click.option("--lr", type=float, help="Learning rate.")
@click.option("--prompt", help="Of the sample at the end.  [default: the text's first word]")
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: cpu]")
@click.option("--threads", type=int, help="CPU threads.  [default: torch's]")
def train(preset: str, text: str | None, run: Path | None, **overrides: Any) -> None:
    """Train on a text, write a run folder, print a sample."""
    if run is not None:
        check_free(run)
    config = PRESETS[preset].override(overrides)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    config = config.override({"threads": torch.get_num_threads()})

    name, characters = read_text(text, config.file)
    if config.characters is not None:
        characters = excerpt(characters, *config.characters)
        name += ", characters {}..{}".format(*config.characters)
    if not characters.startswith(config.opening):
        click.echo(
            f"note: the text begins with {characters[:20]!r}, the recipe's with "
            f"{config.opening!r}: figures won't compare"
        )
    vocabulary = Vocabulary.of(characters)
    # The text's first word is the one prompt that any vocabulary has.
    first_word = (characters.split(maxsplit=1) or [characters])[0]
    config = config.override({"prompt": config.prompt or first_word})
    vocabulary.encode(str(config.prompt), "the prompt")  # better refused now than after training

    trainer = Trainer(config, vocabulary.encode(characters), len(vocabulary))
    facts = {
        "text": name,
        "ids": len(characters),
        "vocabulary": len(vocabulary),
        "samples": trainer.batches.samples,
        "batches": len(trainer.batches),
        "parameters": trainer.model.parameter_count(),
        "torch": str(torch.__version__),
    }
    folder = RunFolder.create(run, preset)
    folder.write_config(config, facts)
    for key, value in facts.items():
        click.echo(f"{key:<11} {value:,}" if isinstance(value, int) else f"{key:<11} {value}")
    click.echo(
        f"{'run':<11} {folder.path}, seed {config.seed}, cell {config.cell}, "
        f"{config.device}, threads {config.threads}"
    )
    for note in trainer.notes:
        click.echo(f"note: {note}")

    if not _train(trainer, folder, vocabulary):
        click.echo(
            f"interrupted at step {trainer.step} of {trainer.total_steps}: what was learned by "
            f"then is saved, try charlm sample {folder.path}"
        )
        raise click.exceptions.Exit(130)  # what shells expect after Ctrl-C
    written = sample(
        trainer.model,
        vocabulary,
        str(config.prompt),
        config.length,
        temperature=config.temperature,
        seed=config.seed,
    )
    folder.write_sample(written)
    click.echo(f"\nsample, temperature {config.temperature:g}:\n{written}\n")
    click.echo(f"saved in {folder.path}; more with: charlm sample {folder.path}")


def _train(trainer: Trainer, folder: RunFolder, vocabulary: Vocabulary) -> bool:
    """Trains, shows it and keeps the folder up to date; False if Ctrl-C ended it early."""
    # No bar where there is no terminal.
    bar = tqdm(total=trainer.total_steps, unit="step", disable=None, leave=False)

    def on_step(loss: torch.Tensor) -> None:
        if bar.n % 20 == 0 and not bar.disable:  # reading the loss makes a GPU wait
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        bar.update()

    with bar, Interrupt() as interrupt:
        for record in trainer.train(on_step, lambda: interrupt.asked):
            folder.write_model(trainer.model, vocabulary)
            folder.add_record(record)
            with bar.external_write_mode():
                click.echo(_line(trainer, record))
        if trainer.step == 0:
            folder.write_model(trainer.model, vocabulary)
    return trainer.step == trainer.total_steps


def _line(trainer: Trainer, record: Record) -> str:
    config = trainer.config
    if config.epochs is not None and config.eval_every is None:
        place = f"Epoch {record.epoch}/{config.epochs}"
    else:
        place = f"Step {record.step}/{trainer.total_steps}"
    line = f"{place}, Loss: {record.train_loss:.4f}"
    loss = record.train_loss
    if record.val_loss is not None:
        line += f", validation loss: {record.val_loss:.4f}"
        loss = record.val_loss
    return (
        f"{line} (perplexity {perplexity(loss):.2f}, {bits_per_character(loss):.3f} bits per "
        "character)"
    )
