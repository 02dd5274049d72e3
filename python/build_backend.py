"""PEP 517 backend: setuptools', built against the torch that the target environment has.

Build isolation would fetch another torch (gigabytes, and another ABI) than the one installed. So
pyproject.toml requires nothing, and this backend asks for what the build needs: torch only where
the environment that is installed into has none, and NVIDIA's compiler where that torch has CUDA and
this system has no nvcc. The target's folder is *appended* to sys.path, so that the build
environment's own setuptools, ninja and pybind11 win.

torch is looked for in this order: the folder that FUSED_LSTM_TORCH names; sys.path (all there is
with --no-build-isolation); this interpreter's site-packages (pip runs the isolated build with the
target's interpreter, so it ends here); and for uv and `python -m build`, which run the build with
an interpreter of their own, VIRTUAL_ENV, CONDA_PREFIX, the virtual environments on PATH, and .venv
in this folder.
"""

from __future__ import annotations

import importlib.machinery
import logging
import os
import platform
import re
import shlex
import shutil
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cuda_toolkit
import torch_versions
from torch_versions import release

ROOT = torch_versions.PYPROJECT.parent
BUILD_REQUIRES = ["setuptools>=77.0.3", "ninja>=1.11", "pybind11>=2.13"]
# nvvm and crt are named for pip to take those of the same version: ptxas refuses newer ones' code.
NVCC_WHEELS = "cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]=="
OVERRIDE = "FUSED_LSTM_TORCH"


def site_packages_of(prefix: Path) -> Path:
    """Where an environment in this folder keeps the packages of an interpreter like this one."""
    variables = {"base": str(prefix), "platbase": str(prefix)}
    scheme = "venv" if "venv" in sysconfig.get_scheme_names() else "posix_prefix"
    return Path(sysconfig.get_path("platlib", scheme, variables))


def candidates() -> Iterator[tuple[Path, str]]:
    """Folders that may hold torch, the likeliest first, each with the name of its source."""
    for folder in sys.path:
        yield Path(folder or os.curdir), "sys.path"
    yield Path(sysconfig.get_path("purelib")), "this interpreter"
    yield Path(sysconfig.get_path("platlib")), "this interpreter"
    if sys.prefix == sys.base_prefix:
        # A system's interpreter: distributions and users keep packages elsewhere, too.
        for folder in [*site.getsitepackages(), site.getusersitepackages()]:
            yield Path(folder), "this interpreter"
    if any("pip-build-env-" in folder for folder in sys.path):
        return  # The target is this interpreter's environment, whichever is activated.
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := os.environ.get(name):
            yield site_packages_of(Path(prefix)), name
    for folder in os.get_exec_path():
        if Path(folder).parent.joinpath("pyvenv.cfg").exists():
            yield site_packages_of(Path(folder).parent), "PATH"
    yield site_packages_of(ROOT / ".venv"), ".venv"


def misfit(folder: Path) -> str:
    """Why the torch in this folder can't be built against; empty where it can."""
    torch = folder / "torch"
    version = torch_version(folder)
    if not version:
        return "its version can't be read from torch/version.py"
    if torch_versions.too_old(version):
        return f"torch {version} is too old: {torch_versions.requirement()} is needed"
    if not any((torch / f"_C{end}").exists() for end in importlib.machinery.EXTENSION_SUFFIXES):
        return f"torch {version} was built for another Python than this {sys.version.split()[0]}"
    for needed in ("include/ATen", "include/torch", "lib"):
        if not (torch / needed).is_dir():
            return f"torch {version} has no folder torch/{needed}"
    return ""


def torch_version(folder: Path) -> str:
    return torch_fact(folder, "__version__")


def torch_fact(folder: Path, name: str) -> str:
    """What the torch in this folder says of itself in torch/version.py, read and not imported.

    Args:
        folder: what holds the folder torch.
        name: "__version__" or "cuda", which is as in "13.0" and empty in a build without CUDA.
    """
    try:
        text = (folder / "torch" / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(rf"^{name}\s*(?::[^=\n]*)?=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return found[1] if found else ""


def find_torch() -> Path | None:
    """The folder that holds the target's torch; None where there is none to build against.

    Says on stderr which torch was passed over and why. Raises SystemExit where FUSED_LSTM_TORCH
    names a folder whose torch doesn't fit.
    """
    if override := os.environ.get(OVERRIDE):
        folder = Path(override)
        folder = folder.parent if folder.name == "torch" else folder
        if not (folder / "torch").is_dir():
            raise SystemExit(f"{OVERRIDE}={override}: that folder holds no torch")
        if why := misfit(folder):
            raise SystemExit(f"{OVERRIDE}={override}: {why}")
        return taken(folder, OVERRIDE)
    seen = set()
    for folder, source in candidates():
        if folder in seen or not (folder / "torch" / "version.py").exists():
            continue
        seen.add(folder)
        why = misfit(folder)
        if not why:
            return taken(folder, source)
        say(f"not building against the torch in {folder} ({source}): {why}")
    return None


def taken(folder: Path, source: str) -> Path:
    """The folder, and a line or two on stderr about the torch in it."""
    version = torch_version(folder)
    say(f"building against torch {version} in {folder} ({source})")
    if note := torch_versions.note(version):
        say(f"{note}; building all the same")
    return folder


def say(message: str) -> None:
    print(f"fused_lstm: {message}", file=sys.stderr)


def requires() -> list[str]:
    if folder := find_torch():
        return [*BUILD_REQUIRES, *nvcc_requirement(folder)]
    say(
        "no installed torch to build against was found: fetching "
        f"{torch_versions.requirement()} for the build, the newest that the package index offers "
        "(the CUDA builds take gigabytes; CUDA kernels are then built only if this system has an "
        "nvcc). To build against an installed one, type its folder: "
        f"{OVERRIDE}=/path/to/site-packages pip install ."
    )
    return [*BUILD_REQUIRES, torch_versions.requirement()]


def nvcc_requirement(folder: Path) -> list[str]:
    """NVIDIA's wheels of nvcc, where the torch in this folder has CUDA and the system no nvcc."""
    cuda = torch_fact(folder, "cuda")
    if not cuda or os.environ.get("FUSED_LSTM_CUDA") == "0":
        return []
    try:
        # The build will have the folders that sys.path has here, and torch's at its end.
        toolkit = cuda_toolkit.find(cuda, [*sys.path, str(folder)])
    except LookupError as why:
        if not wheels_have_nvcc(cuda):
            say(f"building without CUDA kernels, although torch has CUDA {cuda}: {why}")
            return []
        wheels = NVCC_WHEELS + ".".join(cuda.split(".")[:2]) + ".*"
        say(
            f"torch has CUDA {cuda}, and there is no nvcc to build kernels for it: {why}. Fetching "
            f"NVIDIA's for the build, {wheels} (270 MB, removed afterwards). "
            "To build for the CPU only, type: FUSED_LSTM_CUDA=0 pip install ."
        )
        return [wheels]
    say(f"building CUDA kernels with {toolkit.nvcc}, CUDA {toolkit.version}")
    return []


def wheels_have_nvcc(cuda: str) -> bool:
    """Whether NVIDIA publishes an nvcc as wheels for this version of CUDA and this machine."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return False
    return release(cuda) >= (13,)


def with_torch() -> None:
    """Makes torch importable for setup.py, after everything that is importable already."""
    folder = find_torch()
    if folder is None:
        raise SystemExit(
            "fused_lstm is built against torch, and none that fits was found.\n"
            f"Type: pip install {shlex.join([torch_versions.requirement(), *BUILD_REQUIRES])}\n"
            f"or name the folder that holds torch: {OVERRIDE}=/path/to/site-packages"
        )
    sys.path.append(str(folder))


def setuptools_backend(settings: dict[str, Any] | None) -> Any:
    try:
        from setuptools import __version__, build_meta
    except ImportError:
        __version__ = "none"
    if release(__version__) < (77,):
        raise SystemExit(
            f"the build needs setuptools 77.0.3 or newer, and found {__version__}. "
            f"Type: pip install {' '.join(map(repr, BUILD_REQUIRES))}"
        )
    if not {"verbose", "--verbose"} & set(settings or {}):
        # The list of copied files would bury a message.
        logging.disable(logging.WARNING)
    return build_meta


def get_requires_for_build_sdist(config_settings: dict[str, Any] | None = None) -> list[str]:
    return BUILD_REQUIRES[:1]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return requires()


get_requires_for_build_editable = get_requires_for_build_wheel


def prepare_metadata_for_build_wheel(
    metadata_directory: str, config_settings: dict[str, Any] | None = None
) -> str:
    backend = setuptools_backend(config_settings)
    return backend.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


def build_sdist(sdist_directory: str, config_settings: dict[str, Any] | None = None) -> str:
    return setuptools_backend(config_settings).build_sdist(sdist_directory, config_settings)


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    with_torch()
    for leftover in ROOT.glob("build/lib*"):
        # setuptools would put into the wheel what an earlier version left there.
        shutil.rmtree(leftover)
    backend = setuptools_backend(config_settings)
    return backend.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    with_torch()
    backend = setuptools_backend(config_settings)
    return backend.build_editable(wheel_directory, config_settings, metadata_directory)
