"""charlm train."""

from pathlib import Path
from typing import Any

import click
import torch

from charlm.commands import FOLDER
from charlm.commands.options import GroupedCommand, GroupedOption, setting_options
from charlm.corpus import DATA_FOLDER, Corpus, find_text, read_corpus
from charlm.interrupt import Interrupt
from charlm.presets import preset_names, read_preset
from charlm.reporting import Reporter, heading, show_facts, show_preview
from charlm.runfolder import RunFolder, check_free
from charlm.sampling import sample
from charlm.settings import Config
from charlm.training import Trainer


@click.command("train", cls=GroupedCommand)
@click.option(
    "--preset",
    metavar="NAME|FILE.toml",
    default="default",
    show_default=True,
    cls=GroupedOption,
    group="run",
    help=f"The recipe, whose settings the options below change: {', '.join(preset_names())}, or a "
    "file of your own.",
)
@click.option(
    "--run", type=FOLDER, cls=GroupedOption, group="run",
    help="Folder to write.  [default: runs/PRESET-N]",
)  # fmt: skip
@click.option(
    "--text",
    metavar="FILE|-",
    multiple=True,
    cls=GroupedOption,
    group="text",
    help="Text to train on, UTF-8, or several of them one after the other; - reads standard input. "
    f"Without it: the preset's own text in the folder that {DATA_FOLDER} names, or the built-in "
    "corpus.",
)
@setting_options(leave_out=("file", "opening"))
def train(preset: str, text: tuple[str, ...], run: Path | None, **overrides: Any) -> None:
    """Train on a text, write a run folder, print a sample."""
    if run is not None:
        check_free(run)
    config = read_preset(preset)[0].override(overrides)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    config = config.override({"threads": torch.get_num_threads()})

    corpus = read_corpus(find_text(text, config.file), config.vocabulary, config.characters)
    config = config.override({"prompt": config.prompt or _first_word(corpus)})
    corpus.vocabulary.encode(str(config.prompt), "the prompt")  # better refused now than at the end
    trainer = Trainer(config, corpus.ids, len(corpus.vocabulary))
    folder = RunFolder.create(run, config.preset)
    facts = _facts(trainer, corpus)
    folder.write_config(config, facts)
    _show(trainer, corpus, facts, folder)

    if not _train(trainer, folder, corpus):
        click.echo(
            f"interrupted at step {trainer.step} of {trainer.total_steps}: what was learned by "
            f"then is saved, try charlm sample {folder.path}"
        )
        raise click.exceptions.Exit(130)  # what shells expect after Ctrl-C
    heading(config, "generation")
    written = sample(
        trainer.model,
        corpus.vocabulary,
        str(config.prompt),
        config.length,
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p,
        seed=config.seed,
    )
    folder.write_sample(written)
    click.echo(f"\nsample, temperature {config.temperature:g}:\n{written}\n")
    click.echo(f"saved in {folder.path}; more with: charlm sample {folder.path}")


def _first_word(corpus: Corpus) -> str:
    """The text's first word is the one prompt that any vocabulary has."""
    beginning = corpus.vocabulary.decode(corpus.ids[:10_000].tolist())
    return (beginning.split(maxsplit=1) or [beginning])[0]


def _facts(trainer: Trainer, corpus: Corpus) -> dict[str, Any]:
    name = corpus.text.name
    if trainer.config.characters is not None:
        name += ", characters {}..{}".format(*trainer.config.characters)
    return {
        "text": name,
        "ids": len(corpus.ids),
        "vocabulary": len(corpus.vocabulary),
        "samples": trainer.batches.samples,
        "batches": len(trainer.batches),
        "parameters": trainer.model.parameter_count(),
        "torch": str(torch.__version__),
        "sources": corpus.text.sources,
        "sha256": corpus.sha256,
    }


def _show(trainer: Trainer, corpus: Corpus, facts: dict[str, Any], folder: RunFolder) -> None:
    config = trainer.config
    shown = {key: value for key, value in facts.items() if key not in ("sources", "sha256")}
    heading(config, "data")
    _note_other_opening(config, corpus)
    data = ("text", "ids", "vocabulary", "samples", "batches")
    show_facts(config, {key: shown.pop(key) for key in data})
    show_preview(config, corpus)
    heading(config, "model")
    show_facts(config, shown)
    click.echo(
        f"{'run':<11} {folder.path}, seed {config.seed}, cell {config.cell}, "
        f"{trainer.device}, threads {config.threads}"
    )
    for note in trainer.notes:
        click.echo(f"note: {note}")
    heading(config, "training")


def _note_other_opening(config: Config, corpus: Corpus) -> None:
    begins = corpus.vocabulary.decode(corpus.ids[: max(20, len(config.opening))].tolist())
    if not begins.startswith(config.opening):
        click.echo(
            f"note: the text begins with {begins[:20]!r}, the recipe's with {config.opening!r}: "
            "figures won't compare"
        )


def _train(trainer: Trainer, folder: RunFolder, corpus: Corpus) -> bool:
    """Trains, shows it and keeps the folder up to date; False if Ctrl-C ended it early."""
    with Reporter(trainer, corpus) as reporter, Interrupt() as interrupt:
        for record in trainer.train(reporter.step, lambda: interrupt.asked):
            folder.write_model(trainer.model, corpus.vocabulary)
            folder.add_record(record)
            reporter.record(record)
        if trainer.step == 0:
            folder.write_model(trainer.model, corpus.vocabulary)
    if trainer.stopped_early:
        click.echo(f"{trainer.stopped_early}: stopped at step {trainer.step}")
    return trainer.finished
