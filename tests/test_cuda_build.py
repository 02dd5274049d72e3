"""Which nvcc is found, for which architectures it builds, and what is fetched where there is none.

With stand-ins for nvcc, the C++ compiler and torch: no CUDA is needed. test_cuda_resources.py
compiles the kernels themselves.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from build_stand_ins import (
    ROOT,
    Environment,
    build_hook,
    build_info,
    compiler,
    copy_of_the_sources,
    cuda_toolkit,
    fake_torch,
)

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="CUDA is for Linux on x86-64 and arm64",
)

# Says what the real one says; what it "compiles" is a word.
NVCC = """#!/bin/sh
case " $* " in
*" --version "*) echo "Cuda compilation tools, release {release}, V{release}.88";;
*" --dryrun "*)
  echo '#$ _HERE_={top}/bin'
  echo '#$ TOP={top}/bin/..'
  echo '#$ CICC_PATH={top}/bin/../nvvm/bin'
  echo '#$ INCLUDES="-I{top}/bin/../targets/a machine/include"  '
  echo '#$ LIBRARIES=  "-L{top}/bin/../lib64/stubs" "-L{top}/bin/../lib64"';;
*" --list-gpu-code "*) for n in {known}; do echo "sm_$n"; done;;
*)
  {fails}
  while [ "$1" != -o ]; do shift; done
  echo object > "$2";;
esac
"""
KNOWN = "75 80 86 89 90 100 120"


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def toolkit(top: Path, release: str = "13.0", known: str = KNOWN, fails: str = "") -> Path:
    """A folder that looks like a toolkit: nvcc, its compiler proper, headers, the runtime."""
    text = NVCC.format(top=top, release=release, known=known, fails=fails)
    executable(top / "bin" / "nvcc", text)
    executable(top / "nvvm" / "bin" / "cicc", "")
    headers = top / "targets" / "a machine" / "include"
    (headers / "crt").mkdir(parents=True)
    (headers / "cuda_runtime.h").touch()
    (headers / "crt" / "host_config.h").touch()
    (top / "lib64").mkdir()
    (top / "lib64" / f"libcudart.so.{release.partition('.')[0]}").touch()
    return top


@pytest.fixture(autouse=True)
def no_other_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of this machine's is found, and none of its settings count."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "FUSED_LSTM_CUDA", "NVCC_CCBIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cuda_toolkit, "LOCAL", tmp_path / "usr-local")
    path = [folder for folder in os.get_exec_path() if not Path(folder, "nvcc").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(path))


def found(*site_packages: Path, cuda: str = "13.0") -> Path:
    """The folder of the toolkit that is found."""
    return cuda_toolkit.find(cuda, map(str, site_packages)).nvcc.parent.parent


def why_none(*site_packages: Path, cuda: str = "13.0") -> str:
    with pytest.raises(LookupError) as error:
        cuda_toolkit.find(cuda, map(str, site_packages))
    return str(error.value)


# Which nvcc


def test_order_of_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = "no nvcc is on PATH or in /usr/local/cuda*, and CUDA_HOME names none"
    assert why_none(tmp_path) == nothing
    wheels = toolkit(tmp_path / "site-packages" / "nvidia" / "cu13")
    packages = tmp_path / "site-packages"
    assert found(packages) == wheels
    assert why_none(packages, cuda="12.8") == nothing
    older = toolkit(tmp_path / "usr-local" / "cuda-13.2", "13.2")
    newest = toolkit(tmp_path / "usr-local" / "cuda-13.10", "13.10")
    assert found(packages) == newest != older
    usual = toolkit(tmp_path / "usr-local" / "cuda", "13.0")
    assert found(packages) == usual
    on_path = toolkit(tmp_path / "on-path")
    monkeypatch.setenv("PATH", f"{on_path}/bin{os.pathsep}{os.environ['PATH']}")
    assert found(packages) == on_path
    for name in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(toolkit(tmp_path / name)))
        assert found(packages) == tmp_path / name


def test_a_named_folder_hides_the_rest_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(tmp_path / "usr-local" / "cuda")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "absent"))
    assert why_none() == f"CUDA_HOME={tmp_path}/absent holds no bin/nvcc"
    wheels = toolkit(tmp_path / "nvidia" / "cu13")
    assert found(tmp_path) == wheels


@pytest.mark.parametrize("kind", ["script", "link"])
def test_a_wrapper_leads_to_its_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    top = toolkit(tmp_path / "elsewhere")
    wrapper = tmp_path / "bin" / "nvcc"
    if kind == "script":
        executable(wrapper, f'#!/bin/sh\nexec {top}/bin/nvcc "$@"\n')
    else:
        wrapper.parent.mkdir()
        wrapper.symlink_to(top / "bin" / "nvcc")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    one = cuda_toolkit.find("13.0", [])
    assert (one.nvcc, one.version) == (wrapper, "13.0")
    assert one.include_flags() == [f"-isystem{top}/targets/a machine/include"]
    assert one.runtime() == f"{top}/lib64/libcudart.so.13"
    assert one.known() == set(map(int, KNOWN.split()))


def test_the_major_version_must_be_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = toolkit(tmp_path / "usr-local" / "cuda", "12.9")
    assert found(cuda="12.6") == old
    assert why_none() == f"{old}/bin/nvcc is of CUDA 12.9, and torch of CUDA 13.0"
    other = toolkit(tmp_path / "usr-local" / "cuda-13.1", "13.1")
    assert found() == other


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("targets/a machine/include/cuda_runtime.h", "lacks cuda_runtime.h or crt/host_config.h"),
        ("targets/a machine/include/crt/host_config.h", "lacks cuda_runtime.h or crt/host_config"),
        ("nvvm/bin/cicc", "/cuda/nvvm/bin/cicc"),
    ],
)
def test_an_incomplete_toolkit_is_passed_over(tmp_path: Path, missing: str, words: str) -> None:
    broken = toolkit(tmp_path / "usr-local" / "cuda")
    (broken / missing).unlink()
    assert words in why_none()
    assert found(toolkit(tmp_path / "nvidia" / "cu13").parents[1]) == tmp_path / "nvidia" / "cu13"


def test_an_nvcc_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    nvcc = executable(tmp_path / "usr-local" / "cuda" / "bin" / "nvcc", "#!/bin/sh\nexit 3\n")
    assert why_none().startswith(f"{nvcc} --version fails")
    executable(nvcc, "#!/nonexistent/interpreter\n")
    assert why_none().startswith(f"{nvcc} can't be run: ")


# Which architectures


def gencode(*pairs: str) -> list[str]:
    names = [pair.partition(" ") for pair in pairs]
    return [f"-gencode=arch=compute_{of},code={code}" for of, _, code in names]


@pytest.mark.parametrize(
    ("wanted", "flags"),
    [
        ("8.0", gencode("80 sm_80")),
        ("9.0a", gencode("90a sm_90a")),
        ("8.0;9.0a+PTX", gencode("80 sm_80", "90a sm_90a", "90a compute_90a")),
        ("8.0 8.6+PTX", gencode("80 sm_80", "86 sm_86", "86 compute_86")),
        ("7.0;7.5;8.0;8.0", gencode("80 sm_80")),
        ("12.0", gencode("120 sm_120")),
    ],
)
def test_list_of_architectures(
    monkeypatch: pytest.MonkeyPatch, wanted: str, flags: list[str]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert cuda_toolkit.architectures({80, 86, 89, 90, 120})[0] == flags


@pytest.mark.parametrize("value", ["", " "])
def test_default_architectures(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    flags, words = cuda_toolkit.architectures({75, 80, 86, 89, 90, 100})
    assert flags == gencode("80 sm_80", "86 sm_86", "89 sm_89", "90a sm_90a", "90 compute_90")
    assert words == "sm_80 sm_86 sm_89 sm_90a PTX compute_90"
    # An nvcc may be too old for some, or too new.
    assert cuda_toolkit.architectures({80, 86})[0] == gencode("80 sm_80", "86 sm_86")


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("Hopper", "names 'Hopper'; expected numbers, as in '8.0;9.0a+PTX'"),
        ("8.0,9.0", "names '8.0,9.0'; expected numbers"),
        ("native", "names 'native'"),
        ("8.0;13.0", "names '13.0', and this nvcc knows 8.0 9.0 12.0"),
        ("7.0 7.5+PTX", "names nothing that the kernels run on: they need 8.0 or newer"),
    ],
)
def test_list_that_can_not_be_met(monkeypatch: pytest.MonkeyPatch, wanted: str, words: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    with pytest.raises(ValueError) as error:
        cuda_toolkit.architectures({75, 80, 90, 120})
    assert words in str(error.value)


# What the backend fetches

WHEELS = "cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]==13.0.*"


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def ask(environment: Environment, **settings: str) -> tuple[list[str], str]:
    """What the build requires beside setuptools, ninja and pybind11; what is said."""
    done = environment.ask("b.get_requires_for_build_wheel()[3:]", **settings)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.strip("[]\n")), done.stderr


def test_nvcc_is_fetched_where_there_is_none(environment: Environment, tmp_path: Path) -> None:
    fake_torch(environment.site_packages(), "2.11.0+cu130", cuda="13.0")
    absent = str(tmp_path / "absent")
    required, said = ask(environment, CUDA_HOME=absent)
    assert required == [WHEELS]
    assert "torch has CUDA 13.0, and there is no nvcc to build kernels for it: CUDA_HOME=" in said
    assert f"CUDA_HOME={absent} holds no bin/nvcc" in said and "Fetching" in said
    assert "FUSED_LSTM_CUDA=0 pip install ." in said
    assert ask(environment, CUDA_HOME=absent, FUSED_LSTM_CUDA="1")[0] == [WHEELS]
    assert ask(environment, CUDA_HOME=absent, FUSED_LSTM_CUDA="0")[0] == []


def test_nvcc_of_another_major_version_does_not_count(
    environment: Environment, tmp_path: Path
) -> None:
    fake_torch(environment.site_packages(), "2.11.0+cu130", cuda="13.0")
    required, said = ask(environment, CUDA_HOME=str(toolkit(tmp_path / "old", "12.9")))
    assert required == [WHEELS]
    assert "is of CUDA 12.9, and torch of CUDA 13.0" in said


def test_no_nvcc_is_fetched_where_there_is_one(environment: Environment, tmp_path: Path) -> None:
    fake_torch(environment.site_packages(), "2.11.0+cu130", cuda="13.0")
    required, said = ask(environment, CUDA_HOME=str(toolkit(tmp_path / "cuda")))
    assert required == []
    assert f"building CUDA kernels with {tmp_path}/cuda/bin/nvcc, CUDA 13.0" in said
    # Beside torch, too.
    toolkit(environment.site_packages() / "nvidia" / "cu13")
    assert ask(environment, CUDA_HOME=str(tmp_path / "absent"))[0] == []


def test_no_nvcc_is_fetched_for_a_torch_without_cuda(environment: Environment) -> None:
    fake_torch(environment.site_packages(), "2.13.0+cpu")
    required, said = ask(environment, CUDA_HOME="/nonexistent")
    assert required == [] and "CUDA" not in said


def test_there_is_no_nvcc_to_fetch_for_cuda_12(environment: Environment) -> None:
    fake_torch(environment.site_packages(), "2.12.0+cu126", cuda="12.6")
    required, said = ask(environment, CUDA_HOME="/nonexistent")
    assert required == []
    assert "building without CUDA kernels, although torch has CUDA 12.6: CUDA_HOME=" in said


# What is built


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy_of_the_sources(tmp_path_factory.mktemp("sources") / "fused_lstm")
    if not list(tree.glob("csrc/cuda/*.cu")):
        pytest.skip("there are no CUDA kernels yet")
    return tree


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds a wheel beside a torch that says that it is of CUDA 13.0."""
    call = "(setattr(__import__('torch').version, 'cuda', '13.0'), b.build_wheel('dist'))"
    return build_hook(tree, call, **environment)


def lines_of_ninja(tree: Path) -> list[str]:
    (path,) = tree.glob("build/*/build.ninja")
    text = path.read_text().replace("$\n", "")
    return [" ".join(line.split()) for line in text.splitlines()]


def test_kernels_are_built(sources: Path, tmp_path: Path) -> None:
    top, program = toolkit(tmp_path / "cuda"), compiler(tmp_path)
    done = build(sources, CXX=program, CUDA_HOME=str(top), TORCH_CUDA_ARCH_LIST="8.0;9.0a")
    assert done.returncode == 0, done.stderr
    assert build_info(sources)["cuda"] == "yes: CUDA 13.0, sm_80 sm_90a"
    lines = lines_of_ninja(sources)
    flags = {  # of each object, without the build's folder and csrc
        line.split()[1].rstrip(":").split("/", 2)[2].removeprefix("csrc/"): lines[number + 1]
        for number, line in enumerate(lines)
        if line.startswith("build ")
    }
    for name in ("forward", "backward"):
        if not (ROOT / "csrc" / "cuda" / f"{name}.cu").exists():
            continue
        for operands in ("kBf16", "kF16", "kTf32", "kF32"):
            of_nvcc = flags[f"cuda/{name}.cu.{operands}.o"]
            assert f"-DFUSED_LSTM_OPERANDS={operands}" in of_nvcc
            assert "-gencode=arch=compute_90a,code=sm_90a" in of_nvcc and "-fPIC" in of_nvcc
            assert f"-ccbin={program}" in of_nvcc
    assert "targets/a machine/include" in flags["cuda/plan.cpp.o"]
    for name in ("cuda/plan.cpp.o", "operators.cpp.o", "python.cpp.o"):
        assert "-DFUSED_LSTM_HAVE_CUDA" in flags[name]
    link = next(lines[n + 1] for n, line in enumerate(lines) if "libfused_lstm.so: link" in line)
    for library in ("-ltorch_cuda", "-lc10_cuda", f"{top}/lib64/libcudart.so.13"):
        assert library in link


def test_a_wrapper_of_the_compiler_is_not_handed_to_nvcc(sources: Path, tmp_path: Path) -> None:
    top, program = toolkit(tmp_path / "cuda"), f"env {compiler(tmp_path)}"
    done = build(sources, CXX=program, CUDA_HOME=str(top))
    assert done.returncode == 0, done.stderr
    assert build_info(sources)["cuda"].startswith("yes")
    assert not any("ccbin" in line for line in lines_of_ninja(sources))


@pytest.mark.parametrize(
    ("release", "fails", "why"),
    [
        ("12.9", "", "is of CUDA 12.9, and torch of CUDA 13.0"),
        ("13.0", "echo 'host_config.h:9:2: error: unsupported GNU version'; exit 1",
         "can't compile a one-line kernel: host_config.h:9:2: error: unsupported GNU version"),
    ],
)  # fmt: skip
def test_without_a_usable_nvcc_the_rest_is_built(
    sources: Path, tmp_path: Path, release: str, fails: str, why: str
) -> None:
    top = toolkit(tmp_path / "cuda", release, fails=fails)
    settings = {"CXX": compiler(tmp_path), "CUDA_HOME": str(top)}
    done = build(sources, **settings)
    assert done.returncode == 0, done.stderr
    assert build_info(sources)["cuda"] == f"no: {top}/bin/nvcc {why}"
    assert not any("cuda" in line.lower() for line in lines_of_ninja(sources))
    done = build(sources, **settings, FUSED_LSTM_CUDA="1")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"FUSED_LSTM_CUDA=1, but {top}/bin/nvcc {why}" in done.stderr


def test_cuda_can_be_declined(sources: Path, tmp_path: Path) -> None:
    top = toolkit(tmp_path / "cuda")
    done = build(sources, CXX=compiler(tmp_path), CUDA_HOME=str(top), FUSED_LSTM_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert build_info(sources)["cuda"] == "no: FUSED_LSTM_CUDA=0"


def test_a_list_that_can_not_be_met_fails_the_build(sources: Path, tmp_path: Path) -> None:
    settings = {"CXX": compiler(tmp_path), "CUDA_HOME": str(toolkit(tmp_path / "cuda"))}
    done = build(sources, **settings, TORCH_CUDA_ARCH_LIST="Hopper")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "TORCH_CUDA_ARCH_LIST names 'Hopper'" in done.stderr


def test_a_kernel_that_nvcc_rejects(sources: Path, tmp_path: Path) -> None:
    fails = "case $* in *step.cu*) echo 'csrc/cuda/step.cu(7): error: no such thing'; exit 2;; esac"
    top = toolkit(tmp_path / "cuda", fails=fails)
    done = build(sources, CXX=compiler(tmp_path), CUDA_HOME=str(top), TMPDIR=str(tmp_path))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "building csrc/cuda/step.cu.o failed:\n  csrc/cuda/step.cu(7): error" in done.stderr
    assert "FUSED_LSTM_CUDA=0 pip install ." in done.stderr
