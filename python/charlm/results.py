"""What a run came to, and what sets two runs apart: the rows of charlm show and charlm compare."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from charlm.evaluation import bits_per_character, perplexity
from charlm.optimisation import Record
from charlm.reading import one_line
from charlm.settings import Config

Row = Sequence[str]


def as_text(value: Any) -> str:
    """A setting as one would type it, so numbers without thousands' commas; a text with spaces, or
    with what a terminal can't show, in quotes."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str) and (not value.isprintable() or value != value.strip()):
        return one_line(repr(value), 100)
    return one_line(value, 100)


def settings(config: Config) -> dict[str, str]:
    """The settings that a run has, in the order of the Config; those that are off are left out."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name.replace("_", "-"): as_text(value)
        for name, value in values.items()
        if value is not None and value != ""
    }


def facts(values: Mapping[str, Any]) -> dict[str, str]:
    """What came of text and settings; nothing is known of what is in there."""
    return {
        one_line(name, 30): f"{value:,}" if type(value) is int else as_text(value)
        for name, value in values.items()
    }


def results(records: Sequence[Record]) -> dict[str, str]:
    """What the metrics say in the end: how far, how good, how fast."""
    if not records:
        return {"trained": "not as far as the first record"}
    last = records[-1]
    rows = {
        "steps": f"{last.step:,}",
        "epochs": f"{last.epoch:,}",
        "characters": f"{last.tokens_seen:,}",
        "seconds": f"{last.seconds:,.1f}",
        "characters/s": f"{last.tokens_seen / last.seconds:,.0f}" if last.seconds > 0 else "-",
        "training loss": f"{last.train_loss:.4f}",
    }
    if last.val_loss is not None:
        rows["validation loss"] = f"{last.val_loss:.4f}"
    validated = [record for record in records if record.val_loss is not None]
    best = min(validated or records, key=lambda record: record.watched)
    loss = best.watched
    rows |= {
        "best loss": f"{loss:.4f}, {'validation' if validated else 'training'}",
        "at step": f"{best.step:,}",
        "its perplexity": f"{perplexity(loss):.2f}",
        "its bits/character": f"{bits_per_character(loss):.3f}",
    }
    return rows


def columns(runs: Mapping[str, Mapping[str, str]], only_different: bool = False) -> list[Row]:
    """A row for each name that any run has, a column for each run."""
    rows: list[Row] = []
    for name in dict.fromkeys(name for values in runs.values() for name in values):
        cells = [values.get(name, "-") for values in runs.values()]
        if not only_different or len(set(cells)) > 1:
            rows.append([name, *cells])
    return rows


def table(rows: Sequence[Row]) -> str:
    """Rows in columns that line up."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
