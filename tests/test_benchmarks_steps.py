"""The suite `steps`: how kernels are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest

PYTHON = Path(__file__).resolve().parent.parent / "python"


def test_kernels_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PYTHON))
    from benchmarks import steps

    ran = [
        ("void (anonymous namespace)::forward_kernel<(Operands)1, 1>(ForwardParams)", 20.0),
        ("void (anonymous namespace)::backward_kernel<(Operands)1, 1>(BackwardParams)", 30.0),
        ("void (anonymous namespace)::pack_kernel<(Operands)1, true>(PackParams)", 0.5),
        ("nvjet_sm90_hsh_128x256", 1.0),
        ("void (anonymous namespace)::forward_kernel<(Operands)1, 1>(ForwardParams)", 22.0),
    ]
    assert steps.us_a_step(ran, 10) == {"forward_us_a_step": 4.2, "backward_us_a_step": 3.0}
