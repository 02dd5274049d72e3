"""Files that may come from anyone: each kind is read here and nowhere else.

Nothing is unpickled or run. A file must be a plain one; what it claims is checked before memory is
taken for it; and whatever is wrong with it is a CharlmError of one line that names the file.
"""

import contextlib
import errno
import json
import math
import os
import stat
import types
import typing
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from charlm.errors import CharlmError

MIB = 2**20
HEADER_LIMIT = 32 * MIB  # of a safetensors file; a vocabulary of all of Unicode takes half of it
JSON_LIMIT = 32 * MIB
LINES_LIMIT = 256 * MIB  # of metrics.jsonl: a record at each of a million steps

T = TypeVar("T")
Shapes = dict[str, tuple[str, tuple[int, ...]]]  # by name, dtype as safetensors calls it, shape


def printable(text: str) -> str:
    """A text from a file as a terminal may get it: no control characters but newline and tab."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"
        else c
        for c in text
    )  # fmt: skip


def one_line(words: object, limit: int = 300) -> str:
    """Words that may be another's as part of a message: in one line, printable, not too long."""
    line = " ".join(printable(str(words)[: 2 * limit]).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


@contextlib.contextmanager
def blaming(path: Path, wanted: str) -> Iterator[None]:
    """What goes wrong inside is the file's fault: "PATH isn't WANTED: why".

    Raises:
        CharlmError: in place of the errors that wrong contents cause.
    """
    try:
        yield
    except CharlmError as error:
        if str(error).startswith(str(path)):
            raise
        raise CharlmError(f"{path} isn't {wanted}: {one_line(error)}") from None
    except KeyError as error:
        raise CharlmError(f"{path} isn't {wanted}: it has no {one_line(error)}") from None
    except (
        SafetensorError, ValueError, TypeError, AttributeError, IndexError, RuntimeError,
        OverflowError, AssertionError,
    ) as error:  # fmt: skip
        raise CharlmError(f"{path} isn't {wanted}: {one_line(error)}") from None


def open_plain(path: Path) -> BinaryIO:
    """Opens a file of a run to read: never a link, which could lead anywhere, nor a device.

    Raises:
        CharlmError: it isn't there, isn't a plain file, or can't be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise CharlmError(
                f"{path.parent} has no {path.name}: give the folder of a charlm run"
            ) from None
        if error.errno == errno.ELOOP:
            raise CharlmError(
                f"{path} is a symbolic link, which could lead anywhere: put the file itself there"
            ) from None
        raise CharlmError(f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CharlmError(f"{path} isn't a plain file: give the folder of a charlm run")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """The contents of a plain file of at most `limit` bytes."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CharlmError(
                f"{path} has {size:,} bytes, and a run's {path.name} {limit:,} at most"
            )
        return file.read(size)


def read_text(path: Path) -> str:
    with blaming(path, "text in UTF-8"):
        return read_bytes(path, JSON_LIMIT).decode()


def parse_json(data: bytes) -> Any:
    """JSON by the letter: no name twice in an object, no NaN, no number that overflows.

    Raises:
        ValueError: it isn't.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_number,
            parse_float=_number,
            parse_int=_integer,
        )
        # Half a surrogate pair can be written as an escape, and then never be encoded again.
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return values


def _number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits} is not a finite number")
    return number


def _integer(digits: str) -> int:
    if len(digits) > 19 or abs(int(digits)) >= 2**63:
        raise ValueError(f"{digits[:19]}... is too large a number")
    return int(digits)


def read_json(path: Path, wanted: str) -> dict[str, Any]:
    """The object in a JSON file; `wanted` says in an error what it should have been."""
    data = read_bytes(path, JSON_LIMIT)
    with blaming(path, wanted):
        values = parse_json(data)
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
    return values


def read_lines(path: Path) -> bytes:
    """A JSON Lines file."""
    return read_bytes(path, LINES_LIMIT)


def parse_lines(data: bytes, kind: type[T], path: Path) -> list[T]:
    """The dataclass objects of a JSON Lines file's contents."""
    objects = []
    for number, line in enumerate(data.splitlines(), 1):
        with blaming(path, f"a run's metrics at line {number}"):
            objects.append(build(kind, parse_json(line)))
    return objects


def build(kind: type[T], values: Any) -> T:
    """A dataclass of numbers from a JSON object, each of the type that the class says.

    Raises:
        ValueError: not an object, or a name or type that isn't the class's.
    """
    if not isinstance(values, dict):
        raise ValueError("expected a JSON object")
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"it has {name!r}, which is none of {', '.join(hints)}")
        if not _fits(value, hints[name]):
            wanted = getattr(hints[name], "__name__", None) or hints[name]
            raise ValueError(f"{name} must be {wanted}, got {value!r}")
    # What may be None is left out where it is.
    missing = dict.fromkeys(hints.keys() - values.keys())
    for name in hints:
        if name in missing and not _fits(None, hints[name]):
            raise ValueError(f"it has no {name}")
    return kind(**values, **missing)


def _fits(value: object, hint: Any) -> bool:
    """Is a JSON value of a field's type? An int serves as a float, but no bool as an int."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, choice) for choice in hint.__args__)
    if hint is float:
        return type(value) in (int, float)
    return value is None if hint is type(None) else type(value) is hint


def plain_name(name: object) -> str:
    """The name of a file inside a folder, as a run's files may give it.

    Raises:
        ValueError: it would lead out of the folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or not name.isprintable():
        raise ValueError(f"{name!r} is not a file's name")
    if "/" in name or "\\" in name:
        raise ValueError(f"{name!r} leads out of its folder: a run names files without a path")
    return name


class TensorFile:
    """A safetensors file, open. What its header claims is checked; no tensor is read yet.

    Attributes:
        metadata: the strings that go with the tensors.
        shapes: by name, (dtype as safetensors calls it, shape).

    Raises:
        CharlmError: it isn't a safetensors file, or longer or shorter than its header says.
    """

    def __init__(self, path: Path, wanted: str) -> None:
        self.path, self.wanted = path, wanted
        self._file = open_plain(path)
        try:
            with blaming(path, wanted):
                self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT):
            raise ValueError(
                f"its header would have {length:,} bytes, of {size:,} in the file"
                if size >= 8
                else f"it has {size} bytes"
            )
        header = parse_json(self._file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata are not strings")
        self.metadata: dict[str, str] = metadata
        self.shapes: Shapes = {}
        end = 0
        for name, entry in header.items():
            self.shapes[name] = str(entry["dtype"]), tuple(entry["shape"])
            end = max(end, entry["data_offsets"][1])
        if end != size - 8 - length:
            raise ValueError(
                f"its tensors take {end:,} bytes, but {size - 8 - length:,} follow the header"
            )
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > memory // 2:  # the bytes and the tensors are both in memory for a moment
            raise ValueError(f"its {size:,} bytes don't fit this machine's memory")

    def check(self, expected: Mapping[str, Tensor], found: Shapes | None = None) -> None:
        """Compares names, shapes and dtypes with those of tensors, which may be on meta.

        Args:
            found: a part of `shapes`, in place of all.

        Raises:
            ValueError: the first difference.
        """
        found = self.shapes if found is None else found
        for name in [*expected, *found]:
            if name not in found:
                raise ValueError(f"it has no tensor {name!r}")
            if name not in expected:
                raise ValueError(f"it has a tensor {name!r}, which this model has not")
            dtype, shape = found[name]
            wanted = tuple(expected[name].shape)
            if shape != wanted:
                raise ValueError(f"{name} has the shape {shape}, expected {wanted}")
            if safetensors.torch._TYPES.get(dtype) != expected[name].dtype:
                raise ValueError(f"{name} is {dtype}, expected {expected[name].dtype}")

    def read(self) -> dict[str, Tensor]:
        """All tensors, by name, on the CPU.

        Raises:
            CharlmError: a header that contradicts itself, a number that isn't finite.
        """
        with blaming(self.path, self.wanted):
            self._file.seek(0)
            tensors = safetensors.torch.load(self._file.read())
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise ValueError(f"{name} has numbers that aren't finite")
        return tensors

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
