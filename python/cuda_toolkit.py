"""CUDA's compiler: where it is, which architectures it builds for, which objects it makes.

For setup.py, build_backend.py and the tests. Nothing here imports torch or asks for a GPU.

nvcc is looked for in the folder that CUDA_HOME or CUDA_PATH names, or where neither is set, on
PATH, in /usr/local/cuda and in /usr/local/cuda-*; then among NVIDIA's wheels. The first one that is
complete and of the wanted major version is taken.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# These sources are compiled once for each kind of operand: the objects build in parallel.
PER_OPERAND = ("forward.cu", "backward.cu")
OPERANDS = ("kBf16", "kF16", "kTf32", "kF32")

KERNEL_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Icsrc", "-Xcompiler=-fPIC,-Wall,-Wextra"]

# What is newer than these takes the PTX, which the driver compiles: that of a plain architecture,
# for PTX of 9.0a runs on nothing but 9.0.
DEFAULT_ARCHITECTURES = "8.0 8.6 8.9 9.0a"
DEFAULT_PTX = 90
OLDEST = 80  # the first with bf16 and tf32 tensor cores

LOCAL = Path("/usr/local")  # where NVIDIA's installers put toolkits


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command; what it says, in English, is in the result's stdout."""
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},
    )


def first_errors(log: str, count: int = 3) -> str:
    """The first lines of a compiler's output that name an error, indented."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    marks = r"(error|fatal) *:|: undefined |cannot find|Killed"
    errors = [line for line in lines if re.search(marks, line)]
    return "\n".join("  " + line for line in (errors or lines[-count:])[:count])


def run_nvcc(nvcc: Path, *arguments: str) -> str:
    """What nvcc says; raises LookupError where it fails."""
    try:
        done = run([str(nvcc), *arguments])
    except OSError as error:
        raise LookupError(f"{nvcc} can't be run: {error.strerror}") from error
    if done.returncode:
        raise LookupError(f"{nvcc} {arguments[0]} fails: {done.stdout.strip()[:200]}")
    return done.stdout


@dataclass(frozen=True)
class Toolkit:
    """An nvcc, its version ("13.0"), and the folders of its headers and libraries."""

    nvcc: Path
    version: str
    include: Path
    libraries: tuple[Path, ...]

    @property
    def major(self) -> str:
        return self.version.partition(".")[0]

    def include_flags(self) -> list[str]:
        # -isystem/usr/include would hide the C library's headers from the C++ library's.
        return [] if self.include == Path("/usr/include") else [f"-isystem{self.include}"]

    def runtime(self) -> str:
        """What to link for the CUDA runtime: the shared library, needed by its soname.

        torch has loaded the one of that soname when this package is loaded (from NVIDIA's wheel,
        its own folder or the system), and so the process has one runtime, with one current device
        and one last error; a static one would keep its own. The file is named by its path because
        NVIDIA's wheels have no libcudart.so for -lcudart to find.
        """
        for folder in self.libraries:
            for name in (f"libcudart.so.{self.major}", "libcudart.so"):
                if (folder / name).exists():
                    return str(folder / name)
        return "-lcudart"

    def known(self) -> set[int]:
        """The architectures that nvcc compiles for, as 90 for sm_90."""
        listed = run_nvcc(self.nvcc, "--list-gpu-code")
        return set(map(int, re.findall(r"^sm_(\d+)$", listed, re.MULTILINE)))


def examine(nvcc: Path) -> Toolkit:
    """The toolkit that an nvcc belongs to; raises LookupError where a part of it is missing.

    The nvcc on PATH may be a script or a link, with no toolkit around it. So nvcc itself is asked:
    a dry run prints the folders that it takes things from.
    """
    version = re.search(r"release (\d+\.\d+)", run_nvcc(nvcc, "--version"))
    if not version:
        raise LookupError(f"{nvcc} --version names no release")
    said = run_nvcc(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    named = dict(re.findall(r"^#\$ (TOP|CICC_PATH|INCLUDES|LIBRARIES)=(.*?)\s*$", said, re.M))
    top = Path(named.get("TOP") or nvcc.resolve().parent.parent)
    headers = [*re.findall(r'"-I(.+?)"', named.get("INCLUDES", "")), str(top / "include")]
    if top.parent == Path("/usr/lib"):
        headers.append("/usr/include")  # the package of Debian and Ubuntu
    needed = ("cuda_runtime.h", "crt/host_config.h")  # two of NVIDIA's wheels have one each
    include = next((h for h in headers if all(Path(h, n).exists() for n in needed)), None)
    if not include:
        raise LookupError(f"{nvcc} lacks {' or '.join(needed)} in {os.path.abspath(headers[0])}")
    cicc = Path(named.get("CICC_PATH") or top / "nvvm" / "bin", "cicc")
    if not cicc.exists():
        raise LookupError(f"{nvcc} lacks {os.path.abspath(cicc)}")
    libraries = [*re.findall(r'"-L(.+?)"', named.get("LIBRARIES", "")), top / "lib64", top / "lib"]
    real = tuple(dict.fromkeys(Path(os.path.abspath(folder)) for folder in libraries))
    return Toolkit(nvcc, version[1], Path(os.path.abspath(include)), real)


def named_home() -> tuple[str, str] | None:
    """The variable that names a toolkit, and the folder: whoever sets it wants no other."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return name, os.environ[name]
    return None


def release(text: str) -> tuple[int, ...]:
    """The numbers in a version or a folder's name: (13, 0) for "cuda-13.0"."""
    return tuple(map(int, re.findall(r"\d+", text)))


def candidates(major: str, site_packages: Iterable[str]) -> Iterator[Path]:
    """Every nvcc there is, the likeliest first."""
    if home := named_home():
        folders = [Path(home[1], "bin")]
    else:
        newest = sorted(LOCAL.glob("cuda-*"), key=lambda home: release(home.name), reverse=True)
        folders = [*map(Path, os.get_exec_path())]
        folders += [home / "bin" for home in (LOCAL / "cuda", *newest)]
    folders += [Path(folder, f"nvidia/cu{major}/bin") for folder in site_packages]
    seen = set()
    for folder in folders:
        nvcc = Path(os.path.abspath(folder / "nvcc"))
        if shutil.which(nvcc) and nvcc not in seen:
            seen.add(nvcc)
            yield nvcc


def find(cuda: str, site_packages: Iterable[str]) -> Toolkit:
    """The toolkit to build with beside a torch that was built for this version of CUDA.

    Args:
        cuda: torch.version.cuda, as in "13.0".
        site_packages: folders that may hold NVIDIA's wheels.

    Raises:
        LookupError: there is none; the message says which were passed over and why.
    """
    major = cuda.partition(".")[0]
    passed_over = []
    for nvcc in candidates(major, site_packages):
        try:
            toolkit = examine(nvcc)
        except LookupError as why:
            passed_over.append(str(why))
            continue
        if toolkit.major == major:
            return toolkit
        passed_over.append(f"{nvcc} is of CUDA {toolkit.version}, and torch of CUDA {cuda}")
    if passed_over:
        raise LookupError("; ".join(passed_over))
    if home := named_home():
        raise LookupError(f"{home[0]}={home[1]} holds no bin/nvcc")
    raise LookupError("no nvcc is on PATH or in /usr/local/cuda*, and CUDA_HOME names none")


def architectures(known: set[int]) -> tuple[list[str], str]:
    """nvcc's flags for the architectures to build for, and the same in words.

    Args:
        known: what nvcc compiles for, as 90 for sm_90.

    Raises:
        ValueError: TORCH_CUDA_ARCH_LIST holds something else than numbers, one that nvcc doesn't
            know, or none that the kernels run on.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    builds: dict[str, str] = {}  # "sm_90a" or "compute_90": the PTX that it is compiled from
    for name in wanted or DEFAULT_ARCHITECTURES.split():
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not found:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST names {name!r}; expected numbers, as in '8.0;9.0a+PTX'"
            )
        number = int(found[1] + found[2])
        if number < OLDEST or (not wanted and number not in known):
            continue  # Such lists are made for many packages, the default one for many nvccs.
        if number not in known:
            names = " ".join(f"{n // 10}.{n % 10}" for n in sorted(known) if n >= OLDEST)
            raise ValueError(f"TORCH_CUDA_ARCH_LIST names {name!r}, and this nvcc knows {names}")
        ptx = f"compute_{number}{found[3]}"
        builds[f"sm_{number}{found[3]}"] = ptx
        if found[4]:
            builds[ptx] = ptx
    if not wanted and DEFAULT_PTX in known:
        builds[f"compute_{DEFAULT_PTX}"] = f"compute_{DEFAULT_PTX}"
    if not builds:
        raise ValueError(
            f"TORCH_CUDA_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST', '')!r} names nothing "
            f"that the kernels run on: they need {OLDEST // 10}.{OLDEST % 10} or newer"
        )
    flags = [f"-gencode=arch={ptx},code={code}" for code, ptx in builds.items()]
    return flags, " ".join(name.replace("compute", "PTX compute") for name in builds)


@dataclass(frozen=True)
class Cuda:
    """What compiles csrc/cuda."""

    toolkit: Toolkit
    architectures: str  # in words
    flags: list[str]  # nvcc's
    host_flags: list[str]  # the C++ compiler's, beyond those for every source


def prepare(
    cuda: str, site_packages: Iterable[str], host_compiler: str, headers: Iterable[Path]
) -> Cuda:
    """What compiles csrc/cuda beside a torch of this CUDA version.

    Args:
        cuda: torch.version.cuda, as in "13.0".
        site_packages: folders that may hold NVIDIA's wheels.
        host_compiler: the program that nvcc is to call; empty for its own choice.
        headers: folders of headers to look into after the toolkit's.

    Raises:
        LookupError: there is no nvcc that works; says why.
        ValueError: TORCH_CUDA_ARCH_LIST can't be met.
    """
    toolkit = find(cuda, site_packages)
    gencode, words = architectures(toolkit.known())
    flags = KERNEL_FLAGS
    if host_compiler and not os.environ.get("NVCC_CCBIN"):
        flags = [*flags, f"-ccbin={host_compiler}"]
    with tempfile.TemporaryDirectory() as folder:
        # Each nvcc refuses host compilers that are newer than itself.
        probe = Path(folder, "probe.cu")
        probe.write_text("__global__ void probe(int* x) { *x = 1; }\n")
        done = run([str(toolkit.nvcc), *flags, gencode[0], "-c", str(probe), "-o", f"{probe}.o"])
        if done.returncode:
            said = first_errors(done.stdout, 1).strip()
            raise LookupError(f"{toolkit.nvcc} can't compile a one-line kernel: {said}")
    host_flags = [*toolkit.include_flags(), *(f"-isystem{folder}" for folder in headers)]
    return Cuda(toolkit, words, [*flags, *gencode], host_flags)


def kernel_objects(folder: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """The objects that nvcc makes of the sources in csrc/cuda: name, source and defines of each."""
    for source in sorted(folder.glob("*.cu")):
        if source.name not in PER_OPERAND:
            yield f"{source}.o", source, []
            continue
        for operands in OPERANDS:
            yield f"{source}.{operands}.o", source, [f"-DFUSED_LSTM_OPERANDS={operands}"]
