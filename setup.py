"""The compiled part of fused_lstm: sources, flags, what is built where.

Two shared objects are built into the package's folder:

- `libfused_lstm.so`: the operators and their kernels. It knows torch and nothing of Python. Where
  torch has CUDA and there is an nvcc, csrc/cuda is in it (python/cuda_toolkit.py).
- `_C.<abi>.so` (pybind11): csrc/module.cpp, what was built and what this processor offers, and
  csrc/module_*.cpp, streams, text drawn from them, and dropout's masks.

Read from the environment: CXX, CPPFLAGS, CFLAGS, CXXFLAGS, LDFLAGS, MAX_JOBS;
FUSED_LSTM_CUDA=0|1 (unset: where it can be built), CUDA_HOME, CUDA_PATH, TORCH_CUDA_ARCH_LIST;
FUSED_LSTM_SANITIZE=address|undefined|thread (one or more, with commas).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tempfile
from functools import cached_property
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

sys.path.insert(0, str(Path(__file__).resolve().parent / "python"))
import cuda_toolkit  # noqa: E402
import torch_versions  # noqa: E402
from cuda_toolkit import Cuda, first_errors, run  # noqa: E402

MACOS = sys.platform == "darwin"
LIBRARY = "libfused_lstm.so"
MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
TORCH_LIBRARIES = ["-ltorch_cpu", "-lc10"]
TORCH_PYTHON = ["-ltorch_python"]
TORCH_CUDA = ["-ltorch_cuda", "-lc10_cuda"]
CUDA_SOURCES = Path("csrc/cuda")
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
KERNEL_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# Where the compiler knows it: GCC would undo the interleaving that csrc/cpu/activations.h wants.
KEEP_ORDER = "-fno-tree-ter"

# csrc/cpu/kernel.cpp is compiled once for each of these, slowest first; what of it, it says itself.
# Name, flags beyond those of the set before, and an expression that compiles only where compiler
# and assembler know the set.
INSTRUCTION_SETS = [
    ("avx2", ["-mavx2", "-mfma", "-mf16c"], "_mm256_fmadd_ps(__m256(), __m256(), __m256())"),
    (
        "avx512",
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
        "_mm512_fmadd_ps(__m512(), __m512(), __m512())",
    ),
    (
        "avx512_bf16",
        ["-mavx512bf16", "-mavx512vnni"],
        "_mm512_dpbf16_ps(__m512(), __m512bh(), __m512bh())",
    ),
    ("amx", ["-mamx-tile", "-mamx-bf16"], "_tile_dpbf16ps(0, 1, 2)"),
]

# Of csrc, each list compiled as one file: torch's and pybind11's headers take 10 to 20 s, most of
# what these files take one by one (124 s; together 43).
COMPILED_TOGETHER = {
    "operators.cpp": ["ops.cpp", "products.cpp", "triton.cpp", "cpu/host.cpp"],
    "python.cpp": ["module.cpp", "module_mask.cpp", "module_sampler.cpp", "module_stream.cpp"],
}

OPENMP_PROBE = """\
#include <omp.h>
void g(int);
void f() {
#pragma omp parallel
  g(omp_get_thread_num());
}
"""

INSTALL_A_COMPILER = """\
The build needs a C++20 compiler (g++ 11 or clang 14, or newer). To install one:
  Debian, Ubuntu: apt install g++        Fedora: dnf install gcc-c++
  macOS: xcode-select --install          conda: conda install gxx
To name another: CXX=/path/to/compiler pip install ."""


def flags_from_environment(*names: str) -> list[str]:
    return [flag for name in names for flag in shlex.split(os.environ.get(name, ""))]


class Compiler:
    """The C++ compiler that CXX names (a wrapper such as `ccache g++` too), or the system's."""

    def __init__(self) -> None:
        found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        self.command = shlex.split(os.environ.get("CXX", "")) or ([found] if found else [])
        if not self.command:
            raise CompileError(f"no C++ compiler was found.\n{INSTALL_A_COMPILER}")
        self.flags = flags_from_environment("CPPFLAGS", "CFLAGS", "CXXFLAGS")
        if MACOS:
            self.flags += flags_from_environment("ARCHFLAGS")
        self.flags += ["-std=c++20", "-fPIC"]
        failed = self.compile("#include <vector>\nint f(auto x) { return x; }")[1]
        if failed:
            raise CompileError(
                f"the C++ compiler {shlex.join(self.command)} can't compile a two-line program:\n"
                f"{first_errors(failed)}\n{INSTALL_A_COMPILER}"
            )

    def compile(self, source: str, *flags: str) -> tuple[bytes, str]:
        """Compiles a small program; returns the object file's bytes, or b"" and what went wrong."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.cpp")
            path.write_text(source + "\n")
            command = [*self.command, *self.flags, *flags, "-c", str(path), "-o", f"{path}.o"]
            try:
                done = run(command)
            except OSError as error:
                return b"", str(error)
            if done.returncode:
                return b"", done.stdout or f"exit status {done.returncode}"
            return Path(f"{path}.o").read_bytes(), ""

    @cached_property
    def version(self) -> str:
        done = run([*self.command, "--version"])
        return done.stdout.partition("\n")[0].strip() or shlex.join(self.command)

    def instruction_sets(self) -> tuple[dict[str, list[str]], str]:
        """The sets that this compiler builds, each with its flags; the same in words."""
        sets: dict[str, list[str]] = {"generic": []}
        if not self.compile("#ifndef __x86_64__\n#error not x86-64\n#endif")[0]:
            return sets, "generic: the compiler isn't for x86-64"
        flags: list[str] = []
        for name, more, expression in INSTRUCTION_SETS:
            flags = [*flags, *more]
            probe = f"#include <immintrin.h>\nvoid f() {{ {expression}; }}"
            if not self.compile(probe, *flags)[0]:
                why = f"the compiler doesn't take {' '.join(more)}"
                return sets, f"{', '.join(sets)} (no {name}: {why})"
            sets[name] = flags
        return sets, ", ".join(sets)

    def openmp(self, torch: ModuleType) -> tuple[list[str], str]:
        """The flags for OpenMP, and "yes" or "no: why".

        No runtime is linked: a second one beside torch's would start a second set of threads. The
        objects' symbols resolve against the runtime that torch's own library brings along, so
        OpenMP is used only where that one has what this compiler calls: libgomp and LLVM's libomp
        differ.
        """
        for flags in (["-fopenmp"], ["-Xpreprocessor", "-fopenmp"]):
            compiled, _ = self.compile(OPENMP_PROBE, *flags)
            if compiled:
                break
        else:
            return [], "no: the compiler doesn't take -fopenmp, or has no omp.h"
        known = ("GOMP_parallel", "__kmpc_fork_call")
        call = next((name for name in known if name.encode() in compiled), "nothing known")
        library = Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{'dylib' if MACOS else 'so'}"
        if not hasattr(ctypes.CDLL(str(library)), call):
            why = f"the compiler's code calls {call}, which torch's OpenMP runtime lacks"
            return [], f"no: {why}"
        return flags, "yes"


def find_cuda(torch: ModuleType, compiler: Compiler) -> tuple[Cuda | None, str]:
    """What compiles csrc/cuda, or None; and "yes: for what" or "no: why".

    Whether there is a GPU on this machine says nothing about those where the package will run.
    """
    wanted = os.environ.get("FUSED_LSTM_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise CompileError(f"FUSED_LSTM_CUDA is {wanted!r}; expected 0, 1 or nothing")
    if wanted == "0":
        return None, "no: FUSED_LSTM_CUDA=0"
    try:
        if not torch.version.cuda:
            raise LookupError(f"torch {torch.__version__} is a build without CUDA")
        # nvcc's host compiler is one program: of `ccache g++` it would take the first word.
        ccbin = compiler.command[0] if len(compiler.command) == 1 else ""
        # torch's CUDA headers include cuBLAS's and others, which need not be in the toolkit:
        # NVIDIA's wheels beside torch have them.
        beside = sorted(Path(torch.__file__).parents[1].glob("nvidia/*/include"))
        cuda = cuda_toolkit.prepare(torch.version.cuda, sys.path, ccbin, beside)
    except ValueError as error:
        raise CompileError(str(error)) from error
    except LookupError as why:
        if wanted:
            raise CompileError(f"FUSED_LSTM_CUDA=1, but {why}") from why
        return None, f"no: {why}"
    return cuda, f"yes: CUDA {cuda.toolkit.version}, {cuda.architectures}"


def sanitizer_flags() -> list[str]:
    names = os.environ.get("FUSED_LSTM_SANITIZE", "")
    if not names:
        return []
    if unknown := set(names.split(",")) - {"address", "undefined", "thread"}:
        raise CompileError(
            f"FUSED_LSTM_SANITIZE names {', '.join(sorted(unknown))!r}; "
            "expected address, undefined or thread"
        )
    return [f"-fsanitize={names}", "-fno-omit-frame-pointer", "-g"]


def import_requirements() -> tuple[ModuleType, ModuleType]:
    """torch and pybind11; raises CompileError where one of them or of ninja is missing."""
    try:
        import ninja.ninja_syntax  # noqa: F401
        import pybind11
        import torch.utils.cpp_extension
    except Exception as error:  # torch raises OSError where a library of its own is missing
        raise CompileError(
            f"what the build needs can't be imported: {error}.\n"
            f"Type: pip install ninja pybind11 '{torch_versions.requirement()}', or leave out "
            "--no-build-isolation for pip to fetch all but an installed torch"
        ) from error
    return torch, pybind11


def python_include() -> str:
    """The folder of Python.h; raises CompileError where it isn't there."""
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        raise CompileError(
            f"Python's headers aren't in {include}. To install them:\n"
            "  Debian, Ubuntu: apt install python3-dev        Fedora: dnf install python3-devel"
        )
    return include


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class NinjaBuild(build_ext):
    """Writes a ninja file, runs it, and puts the two shared objects where setuptools wants them."""

    def run(self) -> None:
        if sys.platform == "win32":
            raise CompileError("fused_lstm isn't supported on Windows; use WSL 2")
        sanitize = sanitizer_flags()
        compiler = Compiler()
        torch, pybind11 = import_requirements()
        cuda, cuda_info = find_cuda(torch, compiler)
        # One folder a torch and a sanitizer, so that changing between them rebuilds nothing.
        name = f"{sys.implementation.cache_tag}-torch-{torch.__version__}{''.join(sanitize[:1])}"
        self.folder = Path("build", name)
        self.folder.mkdir(parents=True, exist_ok=True)

        openmp, openmp_info = compiler.openmp(torch)
        sets, sets_info = compiler.instruction_sets()
        keep_order = [KEEP_ORDER] if compiler.compile("", "-Werror", KEEP_ORDER)[0] else []
        common = ["-O2", "-DNDEBUG", *WARNINGS, "-Icsrc", *compiler.flags, *openmp, *sanitize]
        self.write_build_info(
            torch=str(torch.__version__),
            tested=" ".join(torch_versions.tested()),
            compiler=compiler.version,
            flags=shlex.join(common),
            cpu=sets_info,
            openmp=openmp_info,
            cuda=cuda_info,
        )
        paths = torch.utils.cpp_extension
        self.write_ninja_file(
            shlex.join(compiler.command),
            common,
            [*KERNEL_FLAGS, *keep_order],
            sets,
            # Compilers don't warn about, and ninja doesn't watch, what comes from -isystem.
            torch_flags=[f"-isystem{path}" for path in paths.include_paths()],
            python_flags=[f"-isystem{pybind11.get_include()}", f"-isystem{python_include()}"],
            link_flags=["-shared", *(["-undefined", "dynamic_lookup"] if MACOS else []), *sanitize],
            torch_libraries=[*(f"-L{path}" for path in paths.library_paths()), *TORCH_LIBRARIES],
            cuda=cuda,
        )
        self.run_ninja(str(torch.__version__))

        package = Path("fused_lstm") if self.inplace else Path(self.build_lib, "fused_lstm")
        package.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, MODULE):
            # Replaced whole: a process that has the old file mapped must keep the old contents.
            shutil.copy(self.folder / name, package / f"{name}.part")
            os.replace(package / f"{name}.part", package / name)

    def write(self, name: str, text: str) -> str:
        """Writes a file for the compiler, if it would change; returns its path."""
        path = self.folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return str(path)

    def write_build_info(self, **facts: str) -> None:
        """Writes build_info.h for csrc/module.cpp."""
        rows = "".join(f"  {{{json.dumps(k)}, {json.dumps(v)}}}, \\\n" for k, v in facts.items())
        self.write("build_info.h", f"#define FUSED_LSTM_BUILD_INFO \\\n{rows}\n")

    def write_ninja_file(
        self,
        compiler: str,
        common: list[str],
        kernel_flags: list[str],
        sets: dict[str, list[str]],
        torch_flags: list[str],
        python_flags: list[str],
        link_flags: list[str],
        torch_libraries: list[str],
        cuda: Cuda | None,
    ) -> None:
        from ninja.ninja_syntax import Writer

        names = [*sets, "cuda"] if cuda else sets
        have = [f"-DFUSED_LSTM_HAVE_{name.upper()}" for name in names]
        kernel = Path("csrc/cpu/kernel.cpp")
        others = {*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")} - {kernel}
        for together in COMPILED_TOGETHER.values():
            others -= {Path("csrc", name) for name in together}
        soname = "-install_name,@rpath/" if MACOS else "-soname,"
        origin = "@loader_path" if MACOS else "$ORIGIN"

        with open(self.folder / "build.ninja", "w") as file:
            ninja = Writer(file, width=100)
            ninja.variable("builddir", str(self.folder))
            command = compiler.replace("$", "$$")
            compile_command = f"{command} -MMD -MF $out.d $flags -c $in -o $out"
            ninja.rule("compile", compile_command, depfile="$out.d", deps="gcc")
            ninja.rule("link", f"{command} $in -o $out $flags")

            def make(rule: str, name: str, sources: list[str], flags: list[str]) -> str:
                variables = {"flags": shlex.join(flags).replace("$", "$$")}
                return ninja.build(str(self.folder / name), rule, sources, variables=variables)[0]

            def make_together(name: str, flags: list[str]) -> str:
                lines = [f'#include "{source}"\n' for source in COMPILED_TOGETHER[name]]
                return make("compile", f"{name}.o", [self.write(name, "".join(lines))], flags)

            flags = [*common, *torch_flags, *have]
            objects = [make("compile", f"{s}.o", [str(s)], flags) for s in sorted(others)]
            objects.append(make_together("operators.cpp", flags))
            cuda_libraries: list[str] = []
            if cuda:
                command = shlex.quote(str(cuda.toolkit.nvcc)).replace("$", "$$")
                nvcc_command = f"{command} -MMD -MF $out.d $flags -c $in -o $out"
                ninja.rule("nvcc", nvcc_command, depfile="$out.d", deps="gcc")
                for name, source, defines in cuda_toolkit.kernel_objects(CUDA_SOURCES):
                    objects.append(make("nvcc", name, [str(source)], [*cuda.flags, *defines]))
                flags = [*common, *cuda.host_flags, *torch_flags, *have]
                for source in sorted(CUDA_SOURCES.glob("*.cpp")):
                    objects.append(make("compile", f"{source}.o", [str(source)], flags))
                cuda_libraries = [*TORCH_CUDA, cuda.toolkit.runtime()]
            # The order matters to the linker: of an inline function that several objects carry it
            # keeps the first, which must be one that every processor can run.
            for name, flags in sets.items():
                flags = [*common, *have, *kernel_flags, *flags, f"-DFUSED_LSTM_ISA={name}"]
                objects.append(make("compile", f"{kernel}.{name}.o", [str(kernel)], flags))
            ldflags = flags_from_environment("LDFLAGS")
            flags = [*link_flags, f"-Wl,{soname}{LIBRARY}", *torch_libraries, *cuda_libraries]
            library = make("link", LIBRARY, objects, [*flags, *ldflags])

            flags = [*common, *python_flags, *torch_flags, *have, f"-I{self.folder}"]
            objects = [make_together("python.cpp", flags)]
            flags = [f"-Wl,-rpath,{origin}", *torch_libraries, *TORCH_PYTHON, *ldflags]
            make("link", MODULE, [*objects, library], [*link_flags, *flags])

    def run_ninja(self, torch: str) -> None:
        import ninja

        jobs = os.environ.get("MAX_JOBS") or str(processors())
        program = str(Path(ninja.BIN_DIR, "ninja"))
        done = run([program, "-v", "-j", jobs, "-f", str(self.folder / "build.ninja")])
        if done.returncode == 0:
            if self.verbose > 1:
                print(done.stdout)
            return
        # Not in the build folder: pip deletes that when it builds from an sdist.
        handle, log = tempfile.mkstemp(prefix="fused_lstm-build-", suffix=".log")
        with os.fdopen(handle, "w") as file:
            file.write(done.stdout)
        failed = re.search(r"^FAILED: (?:\[.*?\] )?(\S+)", done.stdout, re.MULTILINE)
        what = Path(failed[1]).relative_to(self.folder) if failed else "fused_lstm"
        message = f"building {what} failed:\n"
        message += f"{first_errors(done.stdout)}\nThe full log: {log}\n"
        if "Killed" in done.stdout:
            message += "The compiler was killed, most likely for memory: try again with MAX_JOBS=1"
        elif ".cu" in str(what):
            message += "To build without CUDA: FUSED_LSTM_CUDA=0 pip install ."
        elif note := torch_versions.note(torch):
            message += f"{note}.\n{torch_versions.known_to_work()}"
        else:
            message += INSTALL_A_COMPILER
        raise CompileError(message)

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, "fused_lstm", name)) for name in (LIBRARY, MODULE)]

    def get_output_mapping(self) -> dict[str, str]:
        outputs = self.get_outputs() if self.inplace else []
        return {path: str(Path("fused_lstm", Path(path).name)) for path in outputs}


setup(
    # Named for setuptools to know that there is one; the sources are found at build time.
    ext_modules=[Extension("fused_lstm._C", sources=["csrc/module.cpp"])],
    cmdclass={"build_ext": NinjaBuild},
)
