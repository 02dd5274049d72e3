"""A build's stand-ins: compilers, installed torches, environments, a copy of the sources."""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import stat
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "python"))
import cuda_toolkit  # noqa: E402, F401
import torch_versions  # noqa: E402, F401

TREE = [
    "pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md",
    "CONTRIBUTING.md", "csrc", "fused_lstm", "python", "tests",
]  # fmt: skip

# Takes all flags but those that match a pattern; what it "compiles" is a word.
COMPILER = """#!/bin/sh
out= previous=
for argument in "$@"; do
  case "$argument" in {rejects}) echo "cc: error: unrecognized option $argument"; exit 1;; esac
  case "$argument" in {fails_on}) echo "$argument:7:3: error: no such thing"; exit 1;; esac
  if [ "$previous" = -o ]; then out=$argument; fi
  previous=$argument
done
if [ -n "$out" ]; then echo object > "$out"; else echo "stand-in 1.0"; fi
"""


def compiler(folder: Path, rejects: str = "-nothing", fails_on: str = "-nothing") -> str:
    path = folder / "c++"
    path.write_text(COMPILER.format(rejects=rejects, fails_on=fails_on))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def copy_of_the_sources(folder: Path) -> Path:
    skipped = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skipped)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def build_hook(
    tree: Path, call: str, before: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Calls a hook of the backend, as pip does without isolation; `call` is Python, and so are the
    statements `before` it."""
    program = "import sys; sys.path.insert(0, 'python'); import build_backend as b; "
    program += f"{before}print({call})"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def fake_torch(
    site_packages: Path, version: str, suffix: str | None = None, cuda: str | None = None
) -> Path:
    for folder in ("include/ATen", "include/torch", "lib"):
        site_packages.joinpath("torch", folder).mkdir(parents=True)
    suffix = suffix or importlib.machinery.EXTENSION_SUFFIXES[0]
    site_packages.joinpath("torch", f"_C{suffix}").touch()
    text = f"from typing import Optional\n__version__ = '{version}'\ndebug = False\n"
    text += f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
    site_packages.joinpath("torch", "version.py").write_text(text)
    return site_packages


class Environment:
    """A virtual environment, and a project's folder with the backend in it."""

    def __init__(self, folder: Path) -> None:
        self.prefix, self.project = folder / "env", folder / "project"
        venv.create(self.prefix, symlinks=True)
        (self.project / "python").mkdir(parents=True)
        shutil.copy(ROOT / "pyproject.toml", self.project)
        for name in ("build_backend.py", "cuda_toolkit.py", "torch_versions.py"):
            shutil.copy(ROOT / "python" / name, self.project / "python")

    def site_packages(self, prefix: Path | None = None) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return (prefix or self.prefix) / "lib" / version / "site-packages"

    def ask(self, call: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the backend as pip does with isolation: the target's interpreter, and none of its
        packages importable."""
        program = (
            "import json, sys\n"
            "sys.path = ['python'] + [p for p in sys.path if not p.endswith('-packages')]\n"
            f"import build_backend as b\nprint(json.dumps({call}))"
        )
        return subprocess.run(
            [self.prefix / "bin" / "python", "-c", program],
            cwd=self.project,
            env={"PATH": os.defpath, "PYTHONNOUSERSITE": "1", **environment},
            capture_output=True,
            text=True,
        )

    def requires(self, **environment: str) -> list[str]:
        done = self.ask("b.get_requires_for_build_wheel()", **environment)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


def build_info(tree: Path) -> dict[str, str]:
    (path,) = tree.glob("build/*/build_info.h")
    rows = [line.strip(" {},\\") for line in path.read_text().splitlines() if ", " in line]
    return dict(json.loads(f"[{row}]") for row in rows)
