"""What an id stands for: a character of the training text, or a byte."""

import codecs
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from charlm.errors import CharlmError

Codes = np.ndarray[Any, np.dtype[np.uint32 | np.uint8]]
_NO_ID = 0xFFFFFFFF


def code_points(text: str) -> Codes:
    """The Unicode code points of a text, (N,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


class Vocabulary:
    """The distinct characters of a text, sorted; a character's id is its place among them.

    Args:
        characters: they, in the order of their ids.
        unit: "characters", or "bytes": ids are the bytes of UTF-8 and `characters` the 256 that
            have those codes.
    """

    def __init__(self, characters: str, unit: str = "characters") -> None:
        self.characters = characters
        self.unit = unit
        codes = code_points(characters)
        self._ids = np.full(int(codes.max(initial=0)) + 2, _NO_ID, dtype=np.uint32)
        self._ids[codes] = np.arange(len(codes), dtype=np.uint32)

    @classmethod
    def of(cls, text: str) -> "Vocabulary":
        return cls("".join(sorted(set(text))))

    @classmethod
    def of_bytes(cls) -> "Vocabulary":
        return cls("".join(map(chr, range(256))), "bytes")

    @classmethod
    def checked(cls, characters: Any, unit: Any) -> "Vocabulary":
        """One from a file, which may say anything.

        Raises:
            ValueError: they aren't distinct characters, or not the bytes.
        """
        if not isinstance(characters, str) or not 0 < len(set(characters)) == len(characters):
            raise ValueError("its vocabulary is not a string of distinct characters")
        if unit not in ("characters", "bytes"):
            raise ValueError("its ids stand for neither characters nor bytes")
        vocabulary = cls(characters, unit)
        if unit == "bytes" and vocabulary != cls.of_bytes():
            raise ValueError("its vocabulary is not that of bytes")
        return vocabulary

    def __len__(self) -> int:
        return len(self.characters)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (self.characters, self.unit) == (
            other.characters,
            other.unit,
        )

    __hash__ = None  # type: ignore[assignment]

    def ids(self, codes: Codes, what: str, first: int = 0) -> Codes:
        """The ids of code points or bytes (N,); `what` holds them from position `first` on.

        Raises:
            CharlmError: one that isn't in the vocabulary.
        """
        # What is beyond the table lands on its last place, which is no character's.
        ids = self._ids[np.minimum(codes.astype(np.uint32), len(self._ids) - 1)]
        unknown = ids == _NO_ID
        if unknown.any():
            place = int(unknown.argmax())
            raise CharlmError(
                f"{what} has the character {chr(int(codes[place]))!r} at position "
                f"{first + place:,}, which is not among the {len(self)} characters of the "
                f"training text: {self._shown()}"
            )
        return ids

    def encode(self, text: str, what: str = "the text") -> Tensor:
        """The ids of a text, (N,) int64.

        Raises:
            CharlmError: a character outside the vocabulary; `what` names the text it is in.
        """
        if self.unit == "bytes":
            codes: Codes = np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)
        else:
            codes = code_points(text)
        return torch.from_numpy(self.ids(codes, what).astype(np.int64))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that aren't UTF-8 become U+FFFD."""
        return self.decoder()(ids, True)

    def decoder(self) -> Callable[[Sequence[int], bool], str]:
        """`decode` for ids that come in pieces, with whether one is the last: until then, bytes
        that may be the beginning of a character are kept back."""
        if self.unit == "bytes":
            utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
            return lambda ids, last: utf8.decode(bytes(ids), last)
        return lambda ids, last: "".join(self.characters[index] for index in ids)

    def _shown(self) -> str:
        """The characters, or as many as a line takes."""
        shown = repr(self.characters[:100])
        return shown if len(self) <= 100 else f"{shown} and {len(self) - 100:,} more"
