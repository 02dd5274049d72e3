"""Which torch fused_lstm is built against: what pyproject.toml says, read and not repeated.

pyproject.toml declares the oldest, and lists those that the whole suite has passed on. There is no
newest: torch releases a minor version every two months, and an upper bound would make pip throw
away the one that is installed.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


@lru_cache
def requirement() -> str:
    """The dependency as declared: "torch>=2.11"."""
    found = re.search(r'^\s*"(torch>=[\d.]+)"', PYPROJECT.read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        raise SystemExit('pyproject.toml declares no "torch>=X" among its dependencies')
    return found[1]


@lru_cache
def tested() -> tuple[str, ...]:
    """The versions that the suite has passed on, oldest first: ("2.11.0", ...)."""
    found = re.findall(r'"torch==([\d.]+)"', PYPROJECT.read_text(encoding="utf-8"))
    if not found:
        raise SystemExit('pyproject.toml lists no "torch==X.Y.Z" in tool.fused_lstm.tested')
    return tuple(sorted(found, key=release))


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version: (2, 13, 0) for "2.13.0+cpu"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def too_old(version: str) -> bool:
    return release(version) < release(requirement().partition(">=")[2])


def note(version: str) -> str:
    """What is to be said of a torch newer than all that were tested; else nothing."""
    newest = tested()[-1]
    if release(version)[:2] <= release(newest)[:2]:
        return ""
    return f"torch {version} is newer than the newest that was tested, {newest}"


def known_to_work() -> str:
    """What to type where a build fails for the torch that is installed."""
    *others, last = tested()
    return (
        f"Known to work: torch {', '.join(others)} and {last}. "
        f"Type: pip install torch=={last}, and build again"
    )
