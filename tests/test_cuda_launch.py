"""What csrc/cuda/launch.cu asks of the CUDA runtime, and how often: on a runtime that counts."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from build_stand_ins import ROOT, cuda_toolkit
from cuda_emulation import library

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))
KB = 1 << 10


@pytest.fixture
def runtime(tmp_path: Path) -> ctypes.CDLL:
    """A process's first calls: nothing has been asked yet."""
    for major in ("13", "12"):
        try:
            toolkit = cuda_toolkit.find(major, sys.path)
            break
        except LookupError as error:
            why = str(error)
    else:
        pytest.skip(why)
    target = tmp_path / "runtime.so"
    command = shlex.split(
        # Symbolic: a torch with CUDA has the real runtime loaded, which has the same names.
        f"{library.CXX} -std=c++17 -O1 -fPIC -shared -Wl,-Bsymbolic -pthread -Wall -Icsrc -x c++"
    )
    sources = ["csrc/cuda/launch.cu", "tests/cuda_emulation/runtime.cpp"]
    done = subprocess.run(
        [*command, *toolkit.include_flags(), *sources, "-o", str(target)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    loaded = ctypes.CDLL(str(target))
    for name in ("launch", "properties"):
        getattr(loaded, f"runtime_{name}").restype = ctypes.c_char_p
    return loaded


def counts(runtime: ctypes.CDLL) -> dict[str, int]:
    values = (ctypes.c_int * 4)()
    runtime.runtime_counts(values)
    return dict(zip(("attributes", "settings", "occupancies", "launches"), values, strict=True))


def test_what_never_changes_is_asked_once(runtime: ctypes.CDLL) -> None:
    for device in (0, 1):
        runtime.runtime_device(device)
        for _ in range(3):
            assert runtime.runtime_properties() is None
            for kernel in (1, 2):
                for size in (50 * KB, 200 * KB):
                    assert runtime.runtime_resident(kernel, size) == 1
                    assert runtime.runtime_launch(kernel, size) is None
            assert runtime.runtime_launch(3, 40 * KB) is None  # what any kernel may have
    assert counts(runtime) == {
        "attributes": 2 * 5, "settings": 2 * 2, "occupancies": 2 * 4, "launches": 2 * 3 * 5,
    }  # fmt: skip


def test_threads_with_different_sizes(runtime: ctypes.CDLL) -> None:
    """None is refused because another has set the kernel's shared memory back."""

    def launch(size: int) -> list[bytes]:
        said = (runtime.runtime_launch(1, size) for _ in range(2000))
        return [error for error in said if error]

    sizes = [size * KB for size in (50, 100, 150, 227)]
    with ThreadPoolExecutor(len(sizes)) as pool:
        assert not any(pool.map(launch, sizes))


def test_errors_are_told_and_not_kept(runtime: ctypes.CDLL) -> None:
    runtime.runtime_fail(1)
    assert runtime.runtime_properties() == b"made up"
    assert runtime.runtime_resident(1, 0) == 0
    runtime.runtime_fail(0)
    assert runtime.runtime_properties() is None
    assert runtime.runtime_resident(1, 0) == 1
    assert runtime.runtime_launch(1, 228 * KB) == b"made up"
