"""python -m benchmarks.steps: how kernels are told apart; and that it says so where no GPU is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

PYTHON = Path(__file__).resolve().parent.parent / "python"


def test_kernels_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PYTHON))
    from benchmarks import steps

    found = steps.by_kind(
        [
            ("void (anonymous namespace)::forward_kernel<(Operands)1, 1>(ForwardParams)", 2.0),
            ("void (anonymous namespace)::backward_kernel<(Operands)1, 1>(BackwardParams)", 3.0),
            ("void (anonymous namespace)::pack_kernel<(Operands)1, true>(PackParams)", 0.5),
            ("Memset (Device)", 0.25),
            ("nvjet_sm90_hsh_128x256", 1.0),
            ("void at::native::reduce_kernel", 4.0),
        ]
    )
    assert found == {"forward": 2.0, "backward": 3.0, "pack": 0.5, "fill": 0.25, "products": 1.0,
                     "rest": 4.0}  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PYTHON))
    from benchmarks import steps

    found = CliRunner().invoke(steps.main, [])
    assert found.exit_code == 1
    assert "sees no NVIDIA GPU" in found.output
