"""How a text becomes batches: features (B, T) and labels (B, T), the features one place on.

Both kinds give batch `b` of epoch `e` as a pure function of (ids, sizes, seed, e, b), so training
can continue at any place from two numbers and no generator has to be saved. Neither makes anything
as long as the text: it may be a memory map that doesn't fit into memory.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from charlm.corpus import Ids, release
from charlm.errors import CharlmError
from charlm.shuffling import Permutation

Batch = tuple[Tensor, Tensor]
IGNORED = -100  # a label that torch's cross-entropy takes no notice of
_RELEASE_EVERY = 16  # batches; each reads 64 KB a row, the pages around it included
# Batches whose places in the order are computed at once, which takes as long as a single one's.
_ORDERED_AT_ONCE = 64


class Batches(Protocol):
    """What training and evaluation need of either kind."""

    carried: bool  # does a batch go on where the one before it ended?
    samples: int  # windows an epoch

    def __len__(self) -> int:
        """Batches an epoch."""

    def epoch(self, index: int, first: int = 0) -> Iterator[Batch]:
        """The batches of epoch `index`, from batch `first` on; int64, on the CPU."""


def _tensor(ids: Ids) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64))


class Windows:
    """Windows of T characters, one starting every `stride`, shuffled anew for each epoch.

    The last batch of an epoch is short where batch_size doesn't divide the samples.

    Raises:
        CharlmError: ids has no window and the label after it.
    """

    carried = False

    def __init__(self, ids: Ids, window: int, batch_size: int, stride: int, seed: int) -> None:
        if len(ids) <= window:
            raise CharlmError(
                f"the training text has {len(ids):,} characters, too few for one window of "
                f"{window} and the character after it, {window + 1:,}: use a longer text or a "
                "smaller --window"
            )
        # (samples, T + 1), a view
        self._ids = ids
        self._windows = np.lib.stride_tricks.sliding_window_view(ids, window + 1)[::stride]
        self._batch_size = batch_size
        self._seed = seed
        self.samples = len(self._windows)

    def __len__(self) -> int:
        return -(-self.samples // self._batch_size)

    def epoch(self, index: int, first: int = 0) -> Iterator[Batch]:
        # Seeds of neighbouring runs must not share epochs, as seed + index would.
        order = Permutation(self.samples, self._seed * 1_000_003 + index)
        B = self._batch_size
        for batch in range(first, len(self)):
            if batch % _RELEASE_EVERY == 0:
                release(self._ids)
            at = (batch - first) % _ORDERED_AT_ONCE * B
            if at == 0:
                places = order(batch * B, (batch + _ORDERED_AT_ONCE) * B)
            window = _tensor(self._windows[places[at : at + B]])
            yield window[:, :-1], window[:, 1:]


class Rows:
    """B contiguous rows of the text, walked through T characters at a time.

    Row r of a batch goes on where row r of the batch before it ended, so states can be carried.
    What the rows don't fill at the end of the text is left out, and so is a last window shorter
    than T, unless `partial`.

    Raises:
        CharlmError: ids has no full batch and the labels after it.
    """

    carried = True

    def __init__(self, ids: Ids, window: int, batch_size: int, partial: bool = False) -> None:
        columns = (len(ids) - 1) // batch_size
        if columns < window:
            raise CharlmError(
                f"the training text has {len(ids):,} characters, too few for one batch, which "
                f"takes {batch_size} x {window} + 1 = {batch_size * window + 1:,}: use a longer "
                "text, a smaller --batch-size or a smaller --window"
            )
        if not partial:
            columns -= columns % window
        count = batch_size * columns
        self._ids = ids
        self._features = ids[:count].reshape(batch_size, columns)  # a view
        self._labels = ids[1 : count + 1].reshape(batch_size, columns)
        self._window = window
        self.samples = batch_size * len(self)
        self.characters = count  # that are predicted in a pass

    def __len__(self) -> int:
        return -(-self._features.shape[1] // self._window)

    def epoch(self, index: int, first: int = 0) -> Iterator[Batch]:
        for begin in range(first * self._window, self._features.shape[1], self._window):
            if begin // self._window % _RELEASE_EVERY == 0:
                release(self._ids)
            place = slice(begin, begin + self._window)
            yield _tensor(self._features[:, place]), _tensor(self._labels[:, place])


def rows_for_evaluation(ids: Ids, window: int, batch_size: int) -> Rows | None:
    """Rows over a held-out part, as many as it fills with a window each; None for too short."""
    rows = min(batch_size, (len(ids) - 1) // window)
    return Rows(ids, window, rows, partial=True) if rows > 0 else None


class Share:
    """The rows of each batch that `rows` says of so many; where it has none of them, one that isn't
    to be counted: its labels are IGNORED."""

    def __init__(self, batches: Batches, rows: Callable[[int], slice]) -> None:
        self._batches, self._rows = batches, rows
        self.carried, self.samples = batches.carried, batches.samples

    def __len__(self) -> int:
        return len(self._batches)

    def epoch(self, index: int, first: int = 0) -> Iterator[Batch]:
        for features, labels in self._batches.epoch(index, first):
            mine = self._rows(len(labels))
            if mine.start < mine.stop:
                yield features[mine], labels[mine]
            else:
                yield features[:1], torch.full_like(labels[:1], IGNORED)


def cut(rows: slice, parts: int) -> list[slice]:
    """Rows in so many parts of about the same size, none of them empty."""
    count = rows.stop - rows.start
    parts = min(parts, count)
    ends = [rows.start + count * part // parts for part in range(parts + 1)]
    return [slice(begin, end) for begin, end in zip(ends, ends[1:], strict=False)]
