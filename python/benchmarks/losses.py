"""What runs of charlm came to, as one report.

    charlm train --preset tinyshakespeare --run runs/a
    python -m benchmarks.losses runs/a

A row is a run: `train_loss` and `val_loss` (nats a character) of its last record, `steps`,
`characters` and `seconds` (of training and evaluation; a command takes some four more to start).
The machine, its instruction set and the commit are this process's: make the report where and how
the runs were made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from charlm.runfolder import RunFolder

from benchmarks import report
from benchmarks.charlm import DTYPES
from benchmarks.report import option, significant

SHORT = {long: short for short, long in DTYPES.items()}


def row(folder: RunFolder) -> dict[str, Any]:
    config, last = folder.read_config(), folder.read_metrics()[-1]
    return {
        "case": config.preset, "B": config.batch_size, "T": config.window,
        "I": config.embedding, "H": config.hidden, "num_layers": config.layers,
        "threads": config.threads, "dtype": SHORT[config.dtype], "pass": "training",
        "cell": config.cell, "seed": config.seed, "steps": last.step,
        "characters": last.tokens_seen,
        "train_loss": significant(last.train_loss, 5),
        "val_loss": last.val_loss and significant(last.val_loss, 5),
        "seconds": significant(last.seconds),
    }  # fmt: skip


@click.command()
@click.argument("folders", type=click.Path(path_type=Path), nargs=-1, required=True)
@option("--out", "path", type=click.Path(dir_okay=False, path_type=Path), help="JSON to write.")
@click.option("--keep", is_flag=True, help="Write JSON to benchmarks/results.")
def main(folders: tuple[Path, ...], path: Path | None, keep: bool) -> None:
    """Report what these runs of charlm came to."""
    result = report.Report(report.document("charlm", "losses", "cpu"), path)
    click.echo(report.preamble(result.document))
    for folder in folders:
        result.document["rows"].append(row(RunFolder(folder)))
        click.echo(report.line(result.document["rows"][-1]))
    result.save(keep)


if __name__ == "__main__":
    main()
