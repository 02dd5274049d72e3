"""Files of a run: written whole or not at all, and by one writer at a time."""

import fcntl
import os
from pathlib import Path
from types import TracebackType

from charlm.errors import CharlmError

LOCK = ".lock"


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a reader, a crash or a power cut sees the old one or the new one.

    Raises:
        CharlmError: there is no room, or the folder can't be written to. The old file stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            _sync_folder(path.parent)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise CharlmError(
            f"cannot write {path}: {error.strerror or error}; what was saved before is still there"
        ) from None


def _sync_folder(folder: Path) -> None:
    """The new name of a file is on disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_leftover(entry: Path) -> bool:
    """Did a process that was killed leave it: the lock, or a file that it had not moved yet?"""
    return entry.name == LOCK or (
        entry.name.startswith(".") and entry.suffix[1:].isdecimal() and entry.is_file()
    )


def remove_leftovers(folder: Path) -> None:
    """Deletes what a process that was killed left. Call it with the lock held."""
    for entry in folder.iterdir():
        if entry.name != LOCK and is_leftover(entry):
            entry.unlink(missing_ok=True)


class Lock:
    """Keeps a second writer out of a run's folder; the system lets go of it when a process ends.

    Raises:
        CharlmError: another process writes there, or the folder can't be written to.
    """

    def __init__(self, folder: Path) -> None:
        try:
            # Never through a link, which could lead anywhere.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(folder / LOCK, flags, 0o644)
        except OSError as error:
            raise CharlmError(f"cannot write to {folder}: {error.strerror}") from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise CharlmError(
                f"another process is writing to {folder}: wait for it, or choose another folder"
            ) from None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)
