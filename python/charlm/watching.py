"""Watching a run train: a bar on a terminal, plain lines elsewhere, events for TensorBoard."""

import math
import shutil
import sys
import time
from pathlib import Path
from typing import TextIO

import click
from torch import Tensor
from tqdm import tqdm

from charlm.errors import CharlmError
from charlm.evaluation import perplexity
from charlm.optimisation import Record

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


class Progress:
    """Where training stands: loss, perplexity, characters a second and time left.

    On a terminal it is a bar, elsewhere a line each minute, both on standard error.

    Args:
        total: steps of the whole run.
        step: steps that are done already.
        stream: in place of standard error.
        every: seconds from one refresh to the next.  [default: 0.2 on a terminal, 60 elsewhere]
    """

    def __init__(
        self, total: int, step: int = 0, stream: TextIO | None = None, every: float | None = None
    ) -> None:
        self._total, self._first, self._step = total, step, step
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._every = every if every is not None else 0.2 if self._terminal else 60.0
        self._characters = 0
        self._began = self._shown = time.monotonic()
        # tqdm shows nothing on a terminal that doesn't know its size; here it is 80 by 24 then.
        columns, rows = shutil.get_terminal_size()
        self._bar = tqdm(
            total=total, initial=step, file=self._stream, disable=not self._terminal, leave=False,
            ncols=columns, nrows=rows, bar_format=BAR, mininterval=0, miniters=total + 1,
        )  # fmt: skip

    def step(self, loss: Tensor, characters: int) -> None:
        """Counts a step of so many characters. Its loss, 0-d, is read only when it is shown:
        reading makes a GPU wait."""
        self._step += 1
        self._characters += characters
        now = time.monotonic()
        if now - self._shown < self._every:
            return
        self._shown = now
        self._show(loss.item(), now - self._began)

    def _show(self, loss: float, elapsed: float) -> None:
        state = (
            f"loss {loss:.3f}, perplexity {perplexity(loss):.2f}, "
            f"{self._characters / elapsed:,.0f} characters/s"
        )
        if self._terminal:
            self._bar.ncols = shutil.get_terminal_size().columns
            self._bar.n = self._step
            self._bar.set_postfix_str(state, refresh=False)
            self._bar.refresh()
            return
        seconds = elapsed / (self._step - self._first) * (self._total - self._step)
        left = tqdm.format_interval(math.ceil(seconds))
        print(f"step {self._step}/{self._total}, {state}, {left} left", file=self._stream)

    def say(self, line: str) -> None:
        """Prints a line on standard output, above the bar."""
        with self._bar.external_write_mode(file=sys.stdout):
            click.echo(line)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._bar.close()


class Events:
    """TensorBoard's events, beside the metrics in a run's folder; none where TensorBoard isn't
    installed.

    Args:
        folder: the run's.
        step: where training goes on, if it does: later events of the past are taken back.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer = None
            return
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add(self, record: Record) -> None:
        """Raises CharlmError where they can't be written."""
        if self._writer is None:
            return
        values = {
            "loss/training": record.train_loss,
            "loss/validation": record.val_loss,
            "perplexity/training": perplexity(record.train_loss),
            "perplexity/validation": record.val_loss and perplexity(record.val_loss),
            "learning rate": record.lr,
            "characters": record.tokens_seen,
        }
        try:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, record.step)
            self._writer.flush()
        except OSError as error:
            raise CharlmError(f"cannot write TensorBoard's events: {error.strerror}") from None

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
