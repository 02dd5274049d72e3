"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

Natively, without Python and torch, in every dtype, by one to three threads and by two that end as
one; stacks of layers at once in the same way, and streams by ten threads that have one each. For
the whole package under a sanitizer see CONTRIBUTING.md.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNEL = HERE.parent / "csrc" / "cpu" / "kernel.cpp"
STREAM = ("stream", "sampler", "threads", "crowd", "block_cache", "processors", "dispatch")
COMMON = "-w -std=c++20 -O1 -g1 -ffp-contract=fast -fno-math-errno -fno-trapping-math"
SETS = {
    "avx512_bf16": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl "
    "-mavx512bf16 -mavx512vnni",
    "avx2": "-mavx2 -mfma -mf16c",
    "generic": "",
}
SANITIZERS = {
    "address,undefined": "-fopenmp -fno-sanitize-recover=all",
    "thread": "",  # OpenMP's threads would look like races: csrc/cpu/team.h starts its own
}


def instruction_set() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    words = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return next(name for name in SETS if name in words or name == "generic")


@pytest.mark.skipif(not KERNEL.exists(), reason="needs the source tree")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_run_clean(sanitizer: str, tmp_path: Path) -> None:
    isa = instruction_set()
    have = f"-DFUSED_LSTM_ISA={isa} -DFUSED_LSTM_HAVE_{isa.upper()}"
    flags = f"{COMMON} {SETS[isa]} {have} {SANITIZERS[sanitizer]}"
    sanitize = f"-fsanitize={sanitizer}"
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}\n")
    link = ["g++", sanitize, str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(link, capture_output=True).returncode:
        pytest.skip(f"the compiler has no runtime for {sanitize}")

    def build(*arguments: str | Path) -> None:
        command = ["g++", *shlex.split(flags), sanitize, *map(str, arguments)]
        subprocess.run(command, check=True, timeout=280)

    names = ("kernel.o", "sanitized", "stacks", "streams")
    kernel, sanitized, stacks, streams = (tmp_path / name for name in names)
    build("-c", KERNEL, "-o", kernel)
    build(kernel, HERE / "kernel_layers" / "sanitized.cpp", "-o", sanitized)
    build(kernel, HERE / "kernel_layers" / "stacks.cpp", "-o", stacks)
    others = [KERNEL.with_name(f"{name}.cpp") for name in STREAM]
    build(kernel, *others, HERE / "kernel_layers" / "streams.cpp", "-o", streams)
    # ThreadSanitizer's shadow memory does not fit beside addresses as random as newer kernels'.
    fixed = ["setarch", os.uname().machine, "-R"] if shutil.which("setarch") else []
    if fixed and subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []
    for program, said in (
        (sanitized, "180 runs, 0 failures"),
        (stacks, "48 stacks, 0 failures"),
        (streams, "48 streams, 0 failures"),
    ):
        done = subprocess.run(
            [*fixed, str(program)],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "exitcode=66"},
        )
        print(isa, done.stdout, done.stderr)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        assert said in done.stdout
