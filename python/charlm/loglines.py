"""The lines that show a run while it trains, and when a sample is drawn, each under its name.

A log line is two functions: one makes the line of a record, the other, where there is one, a live
line after every step, which takes the place of the progress bar.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from charlm.evaluation import bits_per_character, perplexity
from charlm.optimisation import Record

if TYPE_CHECKING:
    from charlm.training import Trainer


@dataclass(frozen=True)
class LogLine:
    """`record` gives None where a record isn't shown, `live` where a step isn't."""

    record: Callable[["Trainer", Record], str | None]
    live: Callable[["Trainer", str], str] | None = None  # (trainer, sample or "")


def on_one_line(sample: str) -> str:
    """Documents 001 and 003 show newlines as spaces."""
    return sample.replace("\n", " ")


def _plain(trainer: "Trainer", record: Record) -> str | None:
    config = trainer.config
    if config.epochs is not None and not config.eval_every:
        place, index = f"Epoch {record.epoch}/{config.epochs}", record.epoch
    else:
        place, index = f"Step {record.step}/{trainer.total_steps}", len(trainer.records)
    if index % config.log_every and not trainer.finished:
        return None
    line = f"{place}, Loss: {record.train_loss:.4f}"
    if record.val_loss is not None:
        line += f", validation loss: {record.val_loss:.4f}"
    return (
        f"{line} (perplexity {perplexity(record.watched):.2f}, "
        f"{bits_per_character(record.watched):.3f} bits per character)"
    )


def _gpt_simple(trainer: "Trainer", record: Record) -> str:
    """Document 001's; its steps are counted from 0."""
    line = f"Ep {record.epoch} (Step {record.step - 1:06d}): Train loss {record.train_loss:.3f}"
    return line if record.val_loss is None else f"{line}, Val loss {record.val_loss:.3f}"


def _document_004(trainer: "Trainer", record: Record, first: int) -> str | None:
    """Its epochs are counted from 0; the loss is the epoch's mean, not the last batch's."""
    shown = (record.epoch - 1) % trainer.config.log_every == first
    if not shown and not trainer.finished:
        return None
    return f"Epoch: {record.epoch - 1}, Loss: {record.train_loss:.4f}"


def _sonnets(trainer: "Trainer", record: Record) -> str | None:
    return _document_004(trainer, record, trainer.config.log_every - 1)


def _sonnets_rnn(trainer: "Trainer", record: Record) -> str | None:
    return _document_004(trainer, record, 0)


def _live(trainer: "Trainer", sample: str) -> str:
    """Document 003's: the loss is the perplexity of the mean over the pass's batches so far."""
    place = trainer.batch or len(trainer.batches)
    minimum = perplexity(trainer.lowest_mean)
    return (
        f" Iter:{trainer.epoch - (trainer.batch == 0)} - Alpha:{trainer.lr:.3f} - "
        f"Batch {place}/{len(trainer.batches)} - Min Loss:{minimum:.3f} - "
        f"Loss:{perplexity(trainer.running_mean()):.5f}"
    ) + (f" - {on_one_line(sample)}" if sample else "")


def _live_record(trainer: "Trainer", record: Record) -> str | None:
    """A pass's last live line stays where it is; this one adds what only a record knows."""
    if record.val_loss is None:
        return None
    return f" Iter:{record.epoch - 1} - Validation:{perplexity(record.val_loss):.5f}"


LOG_LINES = {
    "plain": LogLine(_plain),
    "gpt-simple": LogLine(_gpt_simple),
    "sonnets": LogLine(_sonnets),
    "sonnets-rnn": LogLine(_sonnets_rnn),
    "live": LogLine(_live_record, _live),
}


# Is a sample due after the step that has just been made?
SAMPLE_TIMES: dict[str, Callable[["Trainer"], bool]] = {
    "end": lambda trainer: False,
    "epoch": lambda trainer: trainer.batch == 0,
    "first-batch": lambda trainer: trainer.batch == 1 % len(trainer.batches),
}
