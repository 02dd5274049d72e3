"""A shuffled order that is computed, not stored: a 1 GB text has a thousand million windows."""

import hashlib
from typing import Any

import numpy as np

Integers = np.ndarray[Any, np.dtype[np.uint64]]

_ROUNDS = 6


class Permutation:
    """The numbers 0 to n - 1 in an order that `seed` decides, in memory that doesn't grow with n.

    A Feistel network permutes the numbers of the fewest bits that hold n - 1; one that falls
    outside is permuted again until it is inside (Black and Rogaway's cycle walking, "Ciphers with
    arbitrary finite domains", 2002).
    """

    def __init__(self, n: int, seed: int) -> None:
        self._n = n
        bits = max(8, (n - 1).bit_length())  # 4 orders of 2 bits would not be alike likely
        self._low = np.uint64(bits // 2)  # the halves differ by a bit where bits is odd
        self._high = np.uint64(bits - bits // 2)
        key = hashlib.sha256(f"{n} {seed}".encode()).digest() * 2
        self._keys = np.frombuffer(key, dtype="<u8")[:_ROUNDS]

    def __call__(self, first: int, end: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Places [first, end) of the order, (end - first,); fewer where it ends before."""
        values = np.arange(first, min(end, self._n), dtype=np.uint64)
        outside = np.ones(len(values), dtype=bool)
        while outside.any():
            values[outside] = self._permute(values[outside])
            outside = values >= self._n
        return values.astype(np.int64)

    def _permute(self, values: Integers) -> Integers:
        low, high = self._low, self._high
        for key in self._keys:
            # The low half goes up, the high one comes down mixed with it; their widths change
            # places, and after an even number of rounds are what they were.
            right = values & ((np.uint64(1) << low) - np.uint64(1))
            left = values >> low
            mixed = (left ^ _hash(right ^ key)) & ((np.uint64(1) << high) - np.uint64(1))
            values = (right << high) | mixed
            low, high = high, low
        return values


def _hash(values: Integers) -> Integers:
    """The finaliser of splitmix64: every bit of a value changes about half of the result's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
