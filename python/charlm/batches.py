"""How a text becomes batches: features (B, T) and labels (B, T), the features one place on.

Both kinds give batch `b` of epoch `e` as a pure function of (ids, sizes, seed, e, b), so training
can continue at any place from two numbers and no generator has to be saved.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from charlm.errors import CharlmError

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """What training and evaluation need of either kind."""

    carried: bool  # does a batch go on where the one before it ended?
    samples: int  # windows an epoch

    def __len__(self) -> int:
        """Batches an epoch."""

    def epoch(self, index: int, first: int = 0) -> Iterator[Batch]:
        """The batches of epoch `index`, from batch `first` on."""


class Windows:
    """Windows of T characters, one starting every `stride`, shuffled anew for each epoch.

    The last batch of an epoch is short where batch_size doesn't divide the samples.

    Raises:
        CharlmError: ids has no window and the label after it.
    """

    carried = False

    def __init__(self, ids: Tensor, window: int, batch_size: int, stride: int, seed: int) -> None:
        if len(ids) <= window:
            raise CharlmError(
                f"the training text has {len(ids):,} characters, too few for one window of "
                f"{window} and the character after it: use a longer text or a smaller --window"
            )
        self._windows = ids.unfold(0, window + 1, stride)  # (samples, T + 1), a view
        self._batch_size = batch_size
        self._seed = seed
        self.samples = len(self._windows)

    def __len__(self) -> int:
        return -(-self.samples // self._batch_size)

    def epoch(self, index: int, first: int = 0) -> Iterator[Batch]:
        # Seeds of neighbouring runs must not share epochs, as seed + index would.
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        order = torch.randperm(self.samples, generator=generator)
        for chosen in order.split(self._batch_size)[first:]:
            window = self._windows[chosen.to(self._windows.device)]
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

    def __init__(self, ids: Tensor, window: int, batch_size: int, partial: bool = False) -> None:
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
        self._features = ids[:count].view(batch_size, columns)
        self._labels = ids[1 : count + 1].view(batch_size, columns)
        self._window = window
        self.samples = batch_size * len(self)

    def __len__(self) -> int:
        return -(-self._features.size(1) // self._window)

    def epoch(self, index: int, first: int = 0) -> Iterator[Batch]:
        features = self._features.split(self._window, dim=1)
        labels = self._labels.split(self._window, dim=1)
        yield from zip(features[first:], labels[first:], strict=True)


def rows_for_evaluation(ids: Tensor, window: int, batch_size: int) -> Rows | None:
    """Rows over a held-out part, as many as it fills with a window each; None for too short."""
    rows = min(batch_size, (len(ids) - 1) // window)
    return Rows(ids, window, rows, partial=True) if rows > 0 else None
