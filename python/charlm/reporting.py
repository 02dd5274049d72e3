"""What a run shows while it trains: its facts, a progress bar or a live line, records, samples."""

import sys
from collections.abc import Mapping
from typing import Any

import click
from torch import Tensor

from charlm.corpus import Corpus
from charlm.loglines import LOG_LINES, SAMPLE_TIMES, on_one_line
from charlm.optimisation import Record
from charlm.runs import Run
from charlm.sampling import sample_by
from charlm.settings import Config
from charlm.training import Trainer
from charlm.watching import Progress


def heading(config: Config, name: str) -> None:
    if config.headings:
        click.echo(f"--- {name} ---")


def show_run(run: Run) -> None:
    """What came of text and settings, before training begins."""
    config = run.config
    shown = {key: value for key, value in run.facts.items() if key not in ("sources", "sha256")}
    if shown.get("processes") == 1:
        del shown["processes"]
    heading(config, "data")
    _note_other_opening(config, run.corpus)
    _show_facts({key: shown.pop(key) for key in list(shown)[:5]})
    _show_preview(config, run.corpus)
    heading(config, "model")
    _show_facts(shown)
    click.echo(
        f"{'run':<11} {run.folder.path}, seed {config.seed}, cell {config.cell}, "
        f"{run.trainer.device}, threads {config.threads}"
    )
    for note in run.trainer.notes:
        click.echo(f"note: {note}")
    heading(config, "training")
    if run.resumed:
        click.echo(f"goes on at step {run.trainer.step} of {run.trainer.total_steps}")


def _show_facts(facts: Mapping[str, Any]) -> None:
    for key, value in facts.items():
        click.echo(f"{key:<11} {value:,}" if isinstance(value, int) else f"{key:<11} {value}")


def _show_preview(config: Config, corpus: Corpus) -> None:
    """The distinct characters, and how the text begins, in characters and in ids (004)."""
    if config.preview:
        first = corpus.ids[: config.preview].tolist()
        click.echo(f"characters  {corpus.vocabulary.characters!r}")
        click.echo(f"first {len(first)}:\n{corpus.vocabulary.decode(first)}\n{first}")


def _note_other_opening(config: Config, corpus: Corpus) -> None:
    begins = corpus.vocabulary.decode(corpus.ids[: max(20, len(config.opening))].tolist())
    if not begins.startswith(config.opening):
        click.echo(
            f"note: the text begins with {begins[:20]!r}, the recipe's with {config.opening!r}: "
            "figures won't compare"
        )


class Reporter:
    """Shows a trainer's steps and records; enter it around the training."""

    def __init__(self, trainer: Trainer, corpus: Corpus) -> None:
        self._trainer = trainer
        self._vocabulary = corpus.vocabulary
        self._line = LOG_LINES[trainer.config.log]
        self._rewrites = self._line.live is not None and sys.stdout.isatty()
        # A live line is its own progress.
        self._progress = None if self._line.live else Progress(trainer.total_steps, trainer.step)
        self._seen = trainer.tokens_seen

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.close()

    def step(self, loss: Tensor) -> None:
        trainer = self._trainer
        if self._progress is not None:
            self._progress.step(loss, trainer.tokens_seen - self._seen)
        self._seen = trainer.tokens_seen
        drawn = self.sample() if SAMPLE_TIMES[trainer.config.samples](trainer) else ""
        if self._line.live is not None:
            trainer.lowest_mean = min(trainer.lowest_mean, trainer.running_mean())
            # Elsewhere than on a terminal, the first and the last of a pass stay.
            if self._rewrites or drawn or trainer.batch == 0:
                end = trainer.batch == 0 or not self._rewrites
                line = self._line.live(trainer, drawn)
                click.echo(("\r\033[K" if self._rewrites else "") + line, nl=end)
        elif drawn:
            self._echo(on_one_line(drawn))

    def record(self, record: Record) -> None:
        line = self._line.record(self._trainer, record)
        if line is not None:
            self._echo(line)

    def sample(self) -> str:
        config = self._trainer.config
        return sample_by(
            config,
            self._trainer.model,
            self._vocabulary,
            config.sample_length,
            config.seed + self._trainer.step,
        )

    def _echo(self, line: str) -> None:
        if self._progress is not None:
            self._progress.say(line)
        else:
            click.echo(line)
