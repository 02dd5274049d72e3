"""charlm train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from charlm.commands import FOLDER
from charlm.commands.options import GroupedCommand, GroupedOption, setting_options
from charlm.corpus import DATA_FOLDER
from charlm.errors import CharlmError
from charlm.interrupt import Interrupt
from charlm.model import CharacterModel
from charlm.presets import preset_names, read_preset
from charlm.processes import joined
from charlm.reporting import Reporter, heading, show_run
from charlm.runfolder import RunFolder
from charlm.runs import Part, Run, begin, resume, settings_from
from charlm.sampling import sample_by
from charlm.settings import Config
from charlm.training import Trainer
from charlm.watching import Events


@click.command("train", cls=GroupedCommand)
@click.option(
    "--preset",
    metavar="NAME|FILE.toml",
    cls=GroupedOption,
    group="run",
    help=f"The recipe, whose settings the options below change: {', '.join(preset_names())}, or a "
    "file of your own.  [default: default]",
)
@click.option(
    "--run",
    type=FOLDER,
    cls=GroupedOption,
    group="run",
    help="Folder to write.  [default: runs/PRESET-N]",
)
@click.option(
    "--resume",
    "resumed",
    type=FOLDER,
    cls=GroupedOption,
    group="run",
    help="Go on with the run in this folder, with the bits of one that was never interrupted; a "
    "finished one with more --epochs or --steps.",
)
@click.option(
    "--init",
    type=FOLDER,
    cls=GroupedOption,
    group="run",
    help="Begin a new run from the weights and vocabulary of the run in this folder.",
)
@click.option(
    "--text",
    metavar="FILE|-",
    multiple=True,
    cls=GroupedOption,
    group="text",
    help="Text to train on, UTF-8; given several times, one after the other; - reads standard "
    f"input. Without it: the preset's own text in the folder that {DATA_FOLDER} names, or the "
    "built-in corpus.",
)
@setting_options(leave_out=("file", "opening"))
def train(
    preset: str | None,
    run: Path | None,
    resumed: Path | None,
    init: Path | None,
    text: tuple[str, ...],
    **overrides: Any,
) -> None:
    """Train on a text, write a run folder, print a sample."""
    if resumed is not None:
        for name, value in (("--preset", preset), ("--run", run), ("--init", init)):
            if value is not None:
                raise CharlmError(f"--resume goes on with a run as it is: leave {name} out")
    config = _settings(preset, resumed, init, overrides)
    with joined(config.device) as processes:
        if processes.size > 1 and "-" in text:
            raise CharlmError("only one of several processes would get standard input: name a file")
        if resumed is not None:
            context = resume(resumed, text, overrides, processes)
        else:
            context = begin(config, text, run, init, processes)
        with context as current:
            if isinstance(current, Run):
                _train_and_sample(current)
            else:
                _train_along(current)


def _settings(
    preset: str | None, resumed: Path | None, init: Path | None, overrides: dict[str, Any]
) -> Config:
    if resumed is not None:
        return RunFolder(resumed).read_config().override({"device": overrides["device"]})
    if init is not None:
        return settings_from(init, preset, overrides)
    return read_preset(preset or "default")[0].override(overrides)


def _train_and_sample(run: Run) -> None:
    config, trainer, folder = run.config, run.trainer, run.folder
    show_run(run)
    model = _train(run)
    if model is None:
        click.echo(
            f"interrupted at step {trainer.step} of {trainer.total_steps}: what was learned by "
            f"then is saved, try charlm sample {folder.path}; go on with charlm train --resume "
            f"{folder.path}"
        )
        raise click.exceptions.Exit(130)  # what shells expect after Ctrl-C
    heading(config, "generation")
    written = sample_by(config, model, run.corpus.vocabulary, config.length, config.seed)
    folder.write_sample(written)
    click.echo(f"\nsample, temperature {config.temperature:g}:\n{written}\n")
    click.echo(f"saved in {folder.path}; more with: charlm sample {folder.path}")


def _train(run: Run) -> CharacterModel | None:
    """Trains, shows it and keeps the folder up to date; None if Ctrl-C ended it early."""
    trainer, folder = run.trainer, run.folder
    # Bytes of metrics.jsonl that any longer run would have, too.
    scheduled = folder.metrics_size

    def on_step(loss: Any) -> None:
        reporter.step(loss)
        if run.checkpoints.due(trainer):
            run.checkpoints.save(trainer, scheduled)

    reporter = Reporter(trainer, run.corpus)
    events = Events(folder.path, trainer.step)
    with reporter, events, Interrupt() as interrupt:
        for record in trainer.train(on_step, _asked(interrupt, trainer)):
            folder.write_model(trainer.whole_model(), run.corpus.vocabulary)
            folder.add_record(record)
            events.add(record)
            reporter.record(record)
            if trainer.records and trainer.records[-1] is record:
                scheduled = folder.metrics_size
        model = trainer.whole_model()
        if trainer.finished or trainer.step == 0:  # or else a record has just saved it
            folder.write_model(model, run.corpus.vocabulary)
        run.checkpoints.save(trainer, scheduled)
    trainer.processes.part()
    if trainer.stopped_early:
        click.echo(f"{trainer.stopped_early}: stopped at step {trainer.step}")
    return model if trainer.finished else None


def _asked(interrupt: Interrupt, trainer: Trainer) -> Callable[[], bool]:
    """Whether one of the processes was interrupted; all ask before each step."""
    return lambda: trainer.processes.any(interrupt.asked, trainer.step)


def _train_along(part: Part) -> None:
    """What another process than the first does, at the same steps."""
    trainer, checkpoints = part.trainer, part.checkpoints

    def on_step(loss: Any) -> None:
        if checkpoints.due(trainer):
            checkpoints.save(trainer, 0)

    with Interrupt() as interrupt:
        for _ in trainer.train(on_step, _asked(interrupt, trainer)):
            trainer.whole_model()
        trainer.whole_model()
        checkpoints.save(trainer, 0)
    trainer.processes.part()
