"""Answers that stay what they are as long as the process runs."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TypeVar

import torch

T = TypeVar("T")


def constant(function: Callable[..., T]) -> Callable[..., T]:
    """Asks once for each of the arguments; torch.compile takes the answer as it is, untraced.

    `forget()` of what is returned has it asked again.
    """
    kept = lru_cache(function)

    @wraps(function)
    def answer(*arguments: object) -> T:
        return kept(*arguments)

    answer.forget = kept.cache_clear  # type: ignore[attr-defined]
    marked: Callable[..., T] = torch.compiler.assume_constant_result(answer)
    return marked
