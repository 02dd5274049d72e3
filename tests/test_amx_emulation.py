"""The AMX kernel, executed: its tile instructions in software, against the generic kernel.

AMX is on few machines; this runs the same source (csrc/cpu/product_amx.h) on any with AVX-512.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNEL = HERE.parent / "csrc" / "cpu" / "kernel.cpp"
COMMON = "-std=c++17 -O2 -fopenmp -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi"
AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl"
EMULATED = f"-DFUSED_LSTM_EMULATE_AMX -I{HERE / 'amx_emulation'} {AVX512}"


def cpu_has_avx512() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "avx512bw" in cpuinfo.read_text()


@pytest.mark.skipif(not KERNEL.exists(), reason="needs the source tree")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.skipif(not cpu_has_avx512(), reason="the emulated tiles want AVX-512 around them")
def test_amx_kernel_agrees_with_the_generic_kernel(tmp_path: Path) -> None:
    def build(source: Path, flags: str, name: str) -> str:
        target = tmp_path / name
        command = ["g++", *shlex.split(COMMON), *shlex.split(flags), str(source), "-o", str(target)]
        subprocess.run(command, check=True, timeout=300)
        return str(target)

    amx = build(KERNEL, f"{EMULATED} -DFUSED_LSTM_ISA=amx -c", "amx.o")
    generic = build(KERNEL, "-DFUSED_LSTM_ISA=generic -c", "generic.o")
    compare = build(HERE / "amx_emulation" / "compare.cpp", f"{amx} {generic}", "compare")
    done = subprocess.run([compare], capture_output=True, text=True, timeout=120)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("differ by") == 6
