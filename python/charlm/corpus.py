"""Texts and vocabularies: where the characters come from and how they become ids."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from charlm.errors import CharlmError

DATA_FOLDER = "CHARLM_DATA"  # environment variable: a folder that holds the presets' texts


def builtin_text() -> str:
    """The Python language documentation that CPython carries: some 465,000 characters of English.

    Its topics are joined in sorted key order, so a Python release has one such text.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CharlmError(
            "this Python was installed without pydoc_data, the built-in text: pass --text FILE"
        ) from None
    return "".join(topics[key] for key in sorted(topics))


def read_text(source: str | None, file: str | None = None) -> tuple[str, str]:
    """Reads a text and returns it with the name to call it by.

    Args:
        source: a path, ``-`` for standard input, or None.
        file: the file name to look for in the folder that ``CHARLM_DATA`` names when source is
            None. With neither, the built-in text is read.

    The text is UTF-8 with a byte order mark, if any, kept as its first character: recipes count
    characters from it. Line ends become newlines.

    Raises:
        CharlmError: the file can't be read, isn't UTF-8, or a preset's own text isn't there.
    """
    if source is None and file is None:
        return "built-in: pydoc_data.topics", builtin_text()
    if source is None:
        folder = os.environ.get(DATA_FOLDER)
        if not folder:
            raise CharlmError(
                f"this preset needs its text: pass --text FILE, or set {DATA_FOLDER} to a folder "
                f"that holds {file}"
            )
        source = str(Path(folder) / str(file))
    name = "standard input" if source == "-" else Path(source).name
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return name, data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise CharlmError(
            f"{name} is not UTF-8 at byte {error.start}: convert it to UTF-8 first"
        ) from None
    except OSError as error:
        raise CharlmError(f"cannot read the text {source}: {error.strerror or error}") from None


class Vocabulary:
    """The distinct characters of a text, sorted; a character's id is its place among them."""

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self._ids = {character: index for index, character in enumerate(characters)}

    @classmethod
    def of(cls, text: str) -> "Vocabulary":
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str, what: str = "the text") -> Tensor:
        """The ids of a text's characters, (N,) int64.

        Raises:
            CharlmError: a character outside the vocabulary; `what` names the text it is in.
        """
        try:
            return torch.tensor([self._ids[character] for character in text], dtype=torch.int64)
        except KeyError as error:
            raise CharlmError(
                f"{what} has the character {error.args[0]!r}, which is not among the "
                f"{len(self)} characters of the training text: {self.characters!r}"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[index] for index in ids)


def split(ids: Tensor, fractions: Sequence[float]) -> list[Tensor]:
    """Cuts ids (N,) into consecutive parts: one for each fraction after a first with the rest.

    ``split(ids, [0.1])`` is training and validation, ``split(ids, [0.1, 0.1])`` training,
    validation and test.
    """
    sizes = [int(len(ids) * fraction) for fraction in fractions]
    return list(ids.split([len(ids) - sum(sizes), *sizes]))


def excerpt(text: str, first: int, end: int) -> str:
    """Characters [first, end) of a text.

    Raises:
        CharlmError: the text ends before `end`.
    """
    if len(text) < end:
        raise CharlmError(
            f"the text has {len(text):,} characters, but this preset takes characters {first} to "
            f"{end}: give the whole text"
        )
    return text[first:end]
