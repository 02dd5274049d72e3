"""Texts: where the characters come from, and how they become ids that need not fit into memory."""

import codecs
import hashlib
import io
import mmap
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from charlm.errors import CharlmError
from charlm.known_texts import KNOWN_TEXTS
from charlm.vocabulary import Codes, Vocabulary, code_points

DATA_FOLDER = "CHARLM_DATA"  # environment variable: a folder that holds the presets' texts
_PIECE = 1 << 20  # bytes read at a time

Ids = np.ndarray[Any, np.dtype[Any]]


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


class Text:
    """One source or several, one after the other, read a piece at a time and as often as needed.

    Args:
        sources: paths, ``-`` for standard input; none is the built-in text.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = [
            source if source == "-" else str(Path(source).resolve()) for source in sources
        ]
        self._given = list(sources)
        self._standard_input: IO[bytes] | None = None

    @property
    def name(self) -> str:
        names = [_name(source) for source in self._given]
        return ", ".join(names) or "built-in: pydoc_data.topics"

    def pieces(self, unit: str) -> Iterator[Codes]:
        """The code points of its characters, or its bytes, in arrays (N,).

        Characters are UTF-8's; a byte order mark, if any, stays the first one, for recipes count
        from it. Line ends become newlines, but not where the unit is bytes.

        Raises:
            CharlmError: a file can't be read, or isn't UTF-8.
        """
        if not self._given:
            text = builtin_text()
            yield np.frombuffer(text.encode(), np.uint8) if unit == "bytes" else code_points(text)
        for source in self._given:
            blocks = self._blocks(source)
            if unit == "bytes":
                yield from (np.frombuffer(block, dtype=np.uint8) for block in blocks)
            else:
                yield from map(code_points, _decode(blocks, _name(source)))

    def _blocks(self, source: str) -> Iterator[bytes]:
        try:
            with self._open(source) as file:
                while block := file.read(_PIECE):
                    yield block
        except OSError as error:
            raise CharlmError(f"cannot read the text {source}: {error.strerror or error}") from None

    def _open(self, source: str) -> IO[bytes]:
        if source != "-":
            return open(source, "rb")
        if self._standard_input is None:  # it can be read once, and is needed twice
            self._standard_input = tempfile.TemporaryFile(buffering=0)
            while block := sys.stdin.buffer.read(_PIECE):
                _write(self._standard_input, block)
        self._standard_input.seek(0)
        return os.fdopen(os.dup(self._standard_input.fileno()), "rb")


def _name(source: str) -> str:
    return "standard input" if source == "-" else Path(source).name


def _write(file: IO[bytes], data: bytes) -> None:
    """Writes all of the data to an unbuffered temporary file, or says that there is no room."""
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        raise CharlmError(
            f"cannot write to {tempfile.gettempdir()}, where the ids of the text are kept: "
            f"{error.strerror or error}; TMPDIR names another folder"
        ) from None


def _decode(blocks: Iterator[bytes], name: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    consumed = 0
    for block in _with_end(blocks):
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block or b"", final=block is None)
        except UnicodeDecodeError as error:
            raise CharlmError(
                f"{name} is not UTF-8 at byte {consumed - waiting + error.start}: convert it to "
                "UTF-8 first, or pass --vocabulary bytes"
            ) from None
        consumed += len(block or b"")
        yield newlines.decode(text, final=block is None)


def _with_end(blocks: Iterator[bytes]) -> Iterator[bytes | None]:
    yield from blocks
    yield None


def find_text(sources: Sequence[str], file: str | None) -> Text:
    """The text of a run: the sources, or else the preset's own file, or else the built-in text.

    Raises:
        CharlmError: the preset's own isn't there.
    """
    if sources or file is None:
        return Text(sources)
    folder = os.environ.get(DATA_FOLDER)
    path = Path(folder or ".") / file
    if folder and path.exists():
        return Text([str(path)])
    known = f" ({KNOWN_TEXTS[file]})" if file in KNOWN_TEXTS else ""
    missing = f"{path} isn't there: " if folder else ""
    raise CharlmError(
        f"{missing}this preset needs its text{known}: pass --text FILE, or set {DATA_FOLDER} to a "
        f"folder that holds {file}"
    )


@dataclass(frozen=True)
class Corpus:
    """A text as ids.

    Args:
        text: where it comes from.
        ids: (N,), of the smallest dtype that holds them, mapped from a file without a name.
        vocabulary: of the part that is used.
        sha256: of its characters' code points, or of its bytes.
    """

    text: Text
    ids: Ids
    vocabulary: Vocabulary
    sha256: str


def read_corpus(
    text: Text,
    unit: str = "characters",
    characters: tuple[int, int] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Corpus:
    """Reads a text twice: for its vocabulary, unless one is given, and for its ids.

    Args:
        unit: "characters" or "bytes".
        characters: the part to use, [first, end); None uses all.
        vocabulary: that of a run that is continued or begun from.

    Raises:
        CharlmError: the text can't be read, ends before the part does, or has a character outside
            the vocabulary; there is no room for the ids.
    """
    if vocabulary is None:
        vocabulary = _vocabulary(text, unit, characters)
    digest = hashlib.sha256()
    dtype = np.min_scalar_type(max(len(vocabulary) - 1, 0))
    with tempfile.TemporaryFile(buffering=0) as file:
        first = 0
        for codes in _part(text, unit, characters):
            digest.update(codes.data)
            ids = vocabulary.ids(codes, text.name, first)
            first += len(ids)
            _write(file, ids.astype(dtype).tobytes())
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if first else b""
    return Corpus(text, np.frombuffer(mapped, dtype=dtype), vocabulary, digest.hexdigest())


def _vocabulary(text: Text, unit: str, characters: tuple[int, int] | None) -> Vocabulary:
    if unit == "bytes":
        return Vocabulary.of_bytes()
    seen = np.zeros(sys.maxunicode + 1, dtype=bool)
    for codes in _part(text, unit, characters):
        seen[codes] = True
    return Vocabulary("".join(map(chr, seen.nonzero()[0])))


def _part(text: Text, unit: str, characters: tuple[int, int] | None) -> Iterator[Codes]:
    """The pieces of a text, or those of its characters [first, end)."""
    if characters is None:
        yield from text.pieces(unit)
        return
    first, end = characters
    passed = 0
    for codes in text.pieces(unit):
        yield codes[max(first - passed, 0) : max(end - passed, 0)]
        passed += len(codes)
        if passed >= end:
            return
    raise CharlmError(
        f"the text has {passed:,} {unit}, but this preset takes {unit} {first} to {end}: give the "
        "whole text"
    )


def release(ids: Ids) -> None:
    """Gives the pages of a memory map back: what has been read doesn't add up to the whole text."""
    base: Any = ids
    while isinstance(base, np.ndarray):
        base = base.base
    mapped = base.obj if isinstance(base, memoryview) else base
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def split(ids: Ids, fractions: Sequence[float]) -> list[Ids]:
    """Cuts ids (N,) into consecutive parts: one for each fraction after a first with the rest.

    ``split(ids, [0.1])`` is training and validation, ``split(ids, [0.1, 0.1])`` training,
    validation and test.
    """
    sizes = [int(len(ids) * fraction) for fraction in fractions]
    ends = np.cumsum([len(ids) - sum(sizes), *sizes])
    return [ids[end - size : end] for end, size in zip(ends, [ends[0], *sizes], strict=True)]
