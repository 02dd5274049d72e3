"""`choose`: how often each id is drawn."""

import math
from typing import Any

import pytest
import torch

from fused_lstm.generation import Choice, choose


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.5}, [1, 0, 0, 0]),
        ({"top_p": 0.51}, [0.625, 0.375, 0, 0]),
        # 0.3 / 0.95 is what top-k leaves of the second; the two together exceed 0.84.
        ({"top_k": 3, "top_p": 0.84}, [0.625, 0.375, 0, 0]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({"temperature": 1e300}, [0.25] * 4),
    ],
    ids=str,
)
def test_probabilities(options: dict, expected: list[float], seed: int) -> None:
    order = [2, 0, 3, 1]  # not sorted: the ids must come back through the sorting
    logits = torch.empty(4)
    logits[order] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(seed)
    draws = 4000
    counts = [0] * 4
    for _ in range(draws):
        counts[int(choose(logits[None], Choice(**options), generator))] += 1
    for index, probability in zip(order, expected, strict=True):
        deviation = math.sqrt(probability * (1 - probability) / draws)
        assert abs(counts[index] / draws - probability) <= 5 * deviation, (counts, seed)


def test_equal_scores_are_taken_in_order() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    generator = torch.Generator().manual_seed(0)

    def drawn(times: int, **options: Any) -> set[int]:
        return {int(choose(logits, Choice(**options), generator)) for _ in range(times)}

    assert drawn(1, temperature=0) == {1}
    assert drawn(20, top_k=1) == {1}
    assert drawn(50, top_k=2) == {1, 2}
