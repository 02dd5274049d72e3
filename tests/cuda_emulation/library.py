"""Builds csrc/cuda for the host, on the emulator in this folder, and talks to it.

Two shared objects: the emulator with toys.cu, and with the kernels and the host file, whose
operators are then `torch.ops.fused_lstm_emulation.*` for tensors on the CPU.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
TORCH = Path(torch.__file__).resolve().parent
CXX = os.environ.get("CXX", "g++")
# nvcc takes different types' pointers for aliases, as kernels do.
FLAGS = "-std=c++20 -O2 -fPIC -fno-strict-aliasing -Wall -Wextra -Wno-unknown-pragmas -Wno-psabi"
FLAGS += f" -DFUSED_LSTM_EMULATION -I{HERE} -I{CSRC}"
TORCH_FLAGS = f"-w -O0 -isystem {TORCH}/include -isystem {TORCH}/include/torch/csrc/api/include"
TORCH_FLAGS += f" -D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
# Symbolic: the two know each other's names, and so does a fused_lstm that was built with CUDA.
LINK = "-shared -Wl,-Bsymbolic"
LINK_TORCH = f"-L{TORCH}/lib -Wl,-rpath,{TORCH}/lib -ltorch_cpu -lc10"

OPERANDS = ("kBf16", "kF16", "kTf32", "kF32")
POLICIES = ("random", "warp ahead", "block ahead", "last first", "first first")
EMULATOR = [
    (HERE / name, "") for name in ("schedule.cpp", "warp.cpp", "counting.cpp", "control.cpp")
]


def why_not() -> str | None:
    """Why nothing can be built here, or None."""
    if not sys.platform.startswith("linux"):
        return "the emulator is written for Linux"
    if not shutil.which(shlex.split(CXX)[0]):
        return f"needs a C++ compiler: no {CXX}"
    if not (CSRC / "cuda" / "device.cuh").exists():
        return "needs the source tree"
    if not (TORCH / "include" / "ATen").exists():
        return "needs torch's headers"
    return None


def folder_of(config: pytest.Config) -> Path:
    """Where what is built is kept: with pytest's cache, from run to run."""
    if not hasattr(config, "cache") or config.cache is None:
        return Path(tempfile.mkdtemp(prefix="cuda_emulation"))
    folder = Path(config.cache.mkdir("cuda_emulation"))
    for path in folder.iterdir():
        if time.time() - path.stat().st_atime > 7 * 24 * 3600:
            path.unlink(missing_ok=True)
    return folder


def kernel_sources() -> list[tuple[Path, str]]:
    """What the library is made of, each with its flags, slowest first."""
    sources = [(CSRC / "cuda" / "host.cpp", TORCH_FLAGS), (CSRC / "products.cpp", TORCH_FLAGS)]
    for path in sorted((CSRC / "cuda").glob("*.cu")):
        if "FUSED_LSTM_OPERANDS" in path.read_text():
            sources += [(path, f"-DFUSED_LSTM_OPERANDS={operands}") for operands in OPERANDS]
        else:
            sources.append((path, ""))
    return [*sources, (CSRC / "cuda" / "plan.cpp", ""), *EMULATOR]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    if done.returncode or "warning" in done.stderr:
        raise RuntimeError(f"{shlex.join(command)}:\n{done.stdout}{done.stderr}")


def made(target: Path, command: list[str]) -> Path:
    """The file that this command makes, unless it is there; none is left half made."""
    if not target.exists():
        part = target.with_suffix(f".{os.getpid()}.part")
        run([*command, "-o", str(part)])
        part.replace(target)
    return target


def build(name: str, sources: list[tuple[Path, str]], link: str, folder: Path) -> Path:
    """The shared object, in `folder`: built there unless it has been, of the very same sources.

    Who comes second waits for the first, which may be another of pytest's workers.
    """
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build_alone(name, sources, link, folder)


def build_alone(name: str, sources: list[tuple[Path, str]], link: str, folder: Path) -> Path:
    headers = [*HERE.glob("*.h"), *CSRC.glob("*.h"), *CSRC.glob("cuda/*.h"), *CSRC.glob("cuda/*h")]
    common = hashlib.sha256(f"{CXX} {FLAGS} {link} {torch.__version__}".encode())
    for header in sorted(headers):
        common.update(header.read_bytes())

    def compiled(source: tuple[Path, str]) -> Path:
        path, flags = source
        digest = common.copy()
        digest.update(flags.encode() + path.read_bytes())
        target = folder / f"{path.stem}-{digest.hexdigest()[:16]}.o"
        return made(target, [*shlex.split(f"{CXX} -x c++ {FLAGS} {flags} -c"), str(path)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    digest = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
    command = [*shlex.split(f"{CXX} {LINK}"), *map(str, objects), *link.split()]
    return made(folder / f"{name}-{digest}.so", command)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """torch's flag, which decides how float32 is multiplied."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Emulation:
    """A library on the emulator. `schedule`, `device` and `dropped` change how its launches run."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.emulation_barriers.restype = ctypes.c_char_p

    @contextmanager
    def schedule(self, seed: int, policy: str = "random") -> Iterator[None]:
        set_schedule = self.library.emulation_schedule
        set_schedule(ctypes.c_uint64(seed), POLICIES.index(policy))
        try:
            yield
        finally:
            set_schedule(ctypes.c_uint64(0), 0)

    @contextmanager
    def device(
        self,
        multiprocessors: int = 4,
        shared_bytes: int = 227 << 10,
        capability: tuple[int, int] = (9, 0),
        cooperative: bool = True,
    ) -> Iterator[None]:
        set_device = self.library.emulation_device
        self.library.emulation_schedule(ctypes.c_uint64(0), 0)
        set_device(multiprocessors, shared_bytes, *capability, int(cooperative))
        try:
            yield
        finally:
            set_device(4, 227 << 10, 9, 0, 1)

    @contextmanager
    def dropped(self, file: str, line: int) -> Iterator[None]:
        """The barrier at this line does nothing."""
        self.library.emulation_drop(file.encode(), line)
        try:
            yield
        finally:
            self.library.emulation_drop(b"", 0)

    def barriers(self, kind: str) -> set[tuple[str, int]]:
        """File and line of the barriers reached so far, of a "block" or a "warp"."""
        lines = self.library.emulation_barriers().decode().splitlines()
        found = [line.split() for line in lines]
        return {(file, int(line)) for which, file, line in found if which == kind}

    def persistent(self) -> bool:
        """Whether blocks passed barriers since the schedule was set: the step path has none."""
        return self.counts()["barriers"] > 0

    @contextmanager
    def counted(self) -> Iterator[dict[str, int]]:
        """What the latest persistent launch inside asked of the hardware, filled in at the end."""
        names = (
            "wavefronts least_wavefronts sectors_read sectors_written sectors_prefetched polled "
            "mma barriers trips cold_trips"
        ).split()
        values = (ctypes.c_int64 * len(names))()
        found: dict[str, int] = {}
        self.library.emulation_count(1)
        try:
            yield found
        finally:
            self.library.emulation_count(0)
        self.library.emulation_tally(values)
        found.update(zip(names, values, strict=True))

    def counts(self) -> dict[str, int]:
        """What happened since the schedule was set."""
        names = "launches together threads switches barriers publications polls fills".split()
        values = (ctypes.c_int64 * len(names))()
        self.library.emulation_counts(values)
        return dict(zip(names, values, strict=True))


@functools.cache
def toys(folder: Path) -> Emulation:
    return Emulation(build("toys", [(HERE / "toys.cu", ""), *EMULATOR], "", folder))


@functools.cache
def kernels(folder: Path) -> Emulation:
    path = build("kernels", kernel_sources(), LINK_TORCH, folder)
    torch.ops.load_library(path)
    return Emulation(path)
