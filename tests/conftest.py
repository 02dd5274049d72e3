"""The header of a test run (seed, hardware, which package is tested) and the seeding of tests."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# FUSED_LSTM_CPU=avx2 pytest: on a processor with more, the tests run as on one with AVX2 only, so
# nn.LSTM is held to the same set. torch reads these when it is first imported.
STOCK = {
    "generic": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}
os.environ.update(STOCK.get(os.environ.get("FUSED_LSTM_CPU", ""), {}))
# What torch.compile keeps from other runs is not to decide this one: code with 8 numbers a vector,
# kept by a run beside others, was compiled for 16 here and wrote past the end of a tensor.
COMPILED = tempfile.TemporaryDirectory(prefix="fused_lstm_tests_")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", COMPILED.name)

# What this pytest is told is not for those that tests start.
os.environ.pop("PYTEST_ADDOPTS", None)

import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
THREADS = torch.get_num_threads()
SEED = int(os.environ.get("FUSED_LSTM_TEST_SEED", "0"))

if not list((ROOT / "fused_lstm").glob("_C.*.so")):
    # `python -m pytest` puts this folder first. Its package isn't built: the installed one is.
    sys.path[:] = [folder for folder in sys.path if Path(folder or os.curdir).resolve() != ROOT]


def pytest_report_header() -> list[str]:
    lines = [
        f"FUSED_LSTM_TEST_SEED={SEED}",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
    ]
    try:
        from fused_lstm import _C
    except ImportError as error:
        return [*lines, f"fused_lstm can't be imported: {error}"]
    usable = [name for name, supported in _C.cpu_isas() if supported]
    return [*lines, f"{Path(_C.__file__).parent}: {_C.cpu_isa()} of {', '.join(usable)}"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every", type=int, default=1, help="Run each Nth of the tests chosen.")
    parser.addoption("--after", help="Run what comes after this test, by its id.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ids = [item.nodeid for item in items]
    if after := config.getoption("--after"):  # as -v prints it: from where pytest was started
        del items[: 1 + next(at for at, name in enumerate(ids) if after.endswith(name))]
    items[:] = items[:: config.getoption("--every")]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU visible"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        for item in items:
            if item.get_closest_marker("alone"):
                item.add_marker(pytest.mark.skip(reason="beside other tests: pytest -m alone"))


GPU_LOST = 86  # the exit status: python -m benchmarks.gpu goes on in another process
failed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        failed.add(report.nodeid)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """After a trap or an illegal access no CUDA call of the process succeeds."""
    if nodeid in failed and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            pytest.exit(f"the GPU no longer serves this process: {error}", GPU_LOST)


@pytest.fixture(autouse=True, scope="session")
def any_pace() -> None:
    """Small calls take several threads at once; test_threads.py says when they do elsewhere."""
    try:
        from fused_lstm import _C
    except ImportError:
        return  # the header says so
    _C.set_any_pace(True)


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed of every test's random numbers; FUSED_LSTM_TEST_SEED sets another."""
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(autouse=True)
def threads_are_set_back() -> Iterator[None]:
    """A test, or a module's fixture, that doesn't has the next ones test something else."""
    found = torch.get_num_threads()
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    assert found == left == THREADS, f"of {THREADS} threads {found} were found, {left} were left"


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call with an embedding, whether ids went to the kernel."""
    from fused_lstm import lookup

    seen = []

    def watched(*arguments: Any) -> Any:
        found = lookup.look_up(*arguments)
        seen.append(found[1] is not None)
        return found

    monkeypatch.setattr("fused_lstm.module.look_up", watched)
    return seen
