"""The build: which torch it takes, what it says when it can't, what it puts into a package.

All but the test marked slow build with a stand-in for the compiler, in a copy of the sources.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from build_stand_ins import (
    ROOT,
    TREE,
    Environment,
    build_hook,
    build_info,
    compiler,
    copy_of_the_sources,
    fake_torch,
    torch_versions,
)

MODULE = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


# Which torch


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_the_sources(tmp_path_factory.mktemp("sources") / "fused_lstm")


def fetches_torch(requires: list[str]) -> bool:
    assert [name.partition(">")[0] for name in requires][:3] == ["setuptools", "ninja", "pybind11"]
    assert requires[3:] in ([], [torch_versions.requirement()])
    return len(requires) == 4


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_without_torch_the_declared_range_is_fetched(environment: Environment) -> None:
    assert fetches_torch(environment.requires())
    done = environment.ask("b.get_requires_for_build_editable()")
    assert torch_versions.requirement() in done.stdout
    assert f"fetching {torch_versions.requirement()}" in done.stderr
    assert "FUSED_LSTM_TORCH=" in done.stderr


def test_torch_of_the_target_is_found(environment: Environment) -> None:
    fake_torch(environment.site_packages(), "2.13.0+cpu")
    assert not fetches_torch(environment.requires())


@pytest.mark.parametrize("source", ["VIRTUAL_ENV", "CONDA_PREFIX", "PATH", ".venv"])
def test_torch_of_another_environment_is_found(environment: Environment, source: str) -> None:
    other = environment.project / (".venv" if source == ".venv" else "other")
    fake_torch(environment.site_packages(other), "2.12.1")
    if source == "PATH":
        assert fetches_torch(environment.requires(PATH=f"{other}/bin:{os.defpath}"))
        (other / "pyvenv.cfg").touch()
        assert not fetches_torch(environment.requires(PATH=f"{other}/bin:{os.defpath}"))
    else:
        variables = {} if source == ".venv" else {source: str(other)}
        assert not fetches_torch(environment.requires(**variables))


def test_pip_installs_into_its_own_interpreter(environment: Environment, tmp_path: Path) -> None:
    """Another environment that happens to be activated doesn't count."""
    other = fake_torch(environment.site_packages(tmp_path / "other"), "2.12.1").parents[2]
    folder = "/tmp/pip-build-env-x/overlay"
    assert not fetches_torch(environment.requires(VIRTUAL_ENV=str(other)))
    assert fetches_torch(environment.requires(VIRTUAL_ENV=str(other), PYTHONPATH=folder))


def test_the_torch_that_is_named_comes_first(environment: Environment, tmp_path: Path) -> None:
    fake_torch(environment.site_packages(), "2.13.0")
    named = fake_torch(tmp_path / "named", "2.12.0")
    for value in (named, named / "torch"):
        done = environment.ask("str(b.find_torch())", FUSED_LSTM_TORCH=str(value))
        assert json.loads(done.stdout) == str(named)


def test_a_named_torch_that_does_not_fit_is_an_error(
    environment: Environment, tmp_path: Path
) -> None:
    old = fake_torch(tmp_path / "old", "2.10.0")
    done = environment.ask("b.requires()", FUSED_LSTM_TORCH=str(old))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"FUSED_LSTM_TORCH={old}: torch 2.10.0 is too old: torch>=" in done.stderr
    done = environment.ask("b.requires()", FUSED_LSTM_TORCH=str(tmp_path))
    assert done.returncode != 0 and "holds no torch" in done.stderr


@pytest.mark.parametrize("version", torch_versions.tested())
def test_tested_versions_are_taken_without_a_word(environment: Environment, version: str) -> None:
    fake_torch(environment.site_packages(), version)
    done = environment.ask("b.get_requires_for_build_wheel()")
    assert not fetches_torch(json.loads(done.stdout))
    assert len(done.stderr.splitlines()) == 1 and version in done.stderr


@pytest.mark.parametrize("version", ["2.10.0", "2.9.1", "1.13.1", "unknown"])
def test_older_versions_are_passed_over(environment: Environment, version: str) -> None:
    fake_torch(environment.site_packages(), version)
    assert fetches_torch(environment.requires())


@pytest.mark.parametrize("version", ["2.100.0", "10.0.0a0+git1234", "3.0.0.dev20300101+cu160"])
def test_a_newer_version_is_taken_with_a_note(environment: Environment, version: str) -> None:
    fake_torch(environment.site_packages(), version)
    done = environment.ask("b.get_requires_for_build_wheel()")
    assert not fetches_torch(json.loads(done.stdout))
    newest = torch_versions.tested()[-1]
    note = f"fused_lstm: torch {version} is newer than the newest that was tested, {newest}; "
    assert done.stderr.splitlines()[1] == note + "building all the same"


def test_a_newer_version_that_does_not_compile(sources: Path, tmp_path: Path) -> None:
    """Another torch helps there, and no other compiler."""
    made_up = "import torch; torch.__version__ = '2.100.0'; "
    program = compiler(tmp_path, fails_on="csrc/autograd.cpp")
    done = build_hook(sources, "b.build_wheel('dist')", made_up, CXX=program, TMPDIR=str(tmp_path))
    assert done.returncode != 0
    assert "torch 2.100.0 is newer than" in done.stderr and "apt install" not in done.stderr
    newest = torch_versions.tested()[-1]
    assert f"and {newest}. Type: pip install torch=={newest}, and build" in done.stderr


def test_the_readme_says_what_was_tested() -> None:
    *others, last = torch_versions.tested()
    words = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"passed on {', '.join(others)} and {last}." in words
    assert f"Any torch from {torch_versions.requirement().partition('>=')[2]} on" in words


def test_torch_of_another_python_is_passed_over(environment: Environment) -> None:
    fake_torch(environment.site_packages(), "2.13.0", suffix=".cpython-27-x86_64-linux-gnu.so")
    done = environment.ask("b.find_torch()")
    assert done.stdout.strip() == "null"
    assert "was built for another Python" in done.stderr


def test_torch_is_appended_to_the_path(environment: Environment) -> None:
    folder = fake_torch(environment.site_packages(), "2.13.0")
    done = environment.ask("[b.with_torch(), sys.path][1]")
    assert json.loads(done.stdout)[0] == "python"
    assert json.loads(done.stdout)[-1] == str(folder)


def test_a_build_without_torch_says_what_to_type(environment: Environment) -> None:
    done = environment.ask("b.build_wheel('.')")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert f"Type: pip install '{torch_versions.requirement()}'" in done.stderr


# What it says


def failure(sources: Path, **environment: str) -> str:
    """What a build that must fail says, without setuptools' prefix."""
    done = build_hook(sources, "b.build_wheel('dist')", **environment)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    assert len(said.splitlines()) < 15, said
    return said.partition("error: ")[2]


@pytest.mark.parametrize("program", ["/nonexistent/c++", "false"])
def test_a_compiler_that_does_not_run(sources: Path, program: str) -> None:
    said = failure(sources, CXX=program)
    assert f"the C++ compiler {program} can't compile a two-line program" in said
    assert "apt install g++" in said and "CXX=" in said


def test_no_compiler(sources: Path, tmp_path: Path) -> None:
    said = failure(sources, CXX="", PATH=str(tmp_path))
    assert "no C++ compiler was found" in said and "apt install g++" in said


def test_a_compiler_that_fails_on_a_source(sources: Path, tmp_path: Path) -> None:
    source = "csrc/autograd.cpp"
    said = failure(sources, CXX=compiler(tmp_path, fails_on=source), TMPDIR=str(tmp_path))
    assert said.startswith(f"building {source}.o failed:\n  {source}:7:3: error: no such")
    (log,) = tmp_path.glob("fused_lstm-build-*.log")
    assert str(log) in said
    assert f"-c {source}" in log.read_text()


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FUSED_LSTM_CUDA", "yes", "expected 0, 1 or nothing"),
        ("FUSED_LSTM_SANITIZE", "adress", "expected address, undefined or thread"),
    ],
)
def test_settings_that_can_not_be_met(
    sources: Path, tmp_path: Path, variable: str, value: str, words: str
) -> None:
    assert words in failure(sources, CXX=compiler(tmp_path), **{variable: value})


# What it builds


@pytest.mark.parametrize(
    ("rejects", "cpu", "openmp"),
    [
        ("-mavx512*", "generic, avx2 (no avx512: the compiler doesn't take -mavx512f ", "no: "),
        (
            "-fopenmp|-mamx*",
            "generic, avx2, avx512, avx512_bf16 (no amx: the compiler doesn't take -mamx-tile ",
            "no: the compiler doesn't take -fopenmp",
        ),
    ],
)
def test_flags_that_the_compiler_rejects_are_left_out(
    sources: Path, tmp_path: Path, rejects: str, cpu: str, openmp: str
) -> None:
    shutil.rmtree(sources / "build", ignore_errors=True)
    done = build_hook(sources, "b.build_wheel('dist')", CXX=compiler(tmp_path, rejects=rejects))
    assert done.returncode == 0, done.stderr
    info = build_info(sources)
    assert info["cpu"].startswith(cpu)
    assert info["openmp"].startswith(openmp)
    (ninja_file,) = sources.glob("build/*/build.ninja")
    for flag in rejects.replace("*", "").split("|"):
        assert flag not in ninja_file.read_text()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist of the sources, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = copy_of_the_sources(folder / "tree")
    done = build_hook(tree, "b.build_sdist('..')")
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".tar.gz")


def test_sdist_holds_all_sources(sdist: Path) -> None:
    tree = sdist.parent / "tree"
    files = [path.relative_to(tree) for path in tree.rglob("*") if path.is_file()]
    sources = {path for path in files if path.parts[0] in TREE}
    missing = {str(path) for path in sources if not (sdist / path).exists()}
    assert not missing
    assert (sdist / "python" / "build_backend.py").exists()
    assert (sdist / "python" / "cuda_toolkit.py").exists()
    assert not list(sdist.rglob("*.so"))


def test_wheel_from_the_sdist(sdist: Path, tmp_path: Path) -> None:
    # What an earlier version left behind stays out of the wheel.
    leftover = sdist / "build" / "lib.linux-x86_64-cpython" / "fused_lstm"
    leftover.mkdir(parents=True)
    (leftover / "gone.py").touch()
    target = tmp_path / "wheel"
    done = build_hook(sdist, f"b.build_wheel({str(target)!r})", CXX=compiler(tmp_path))
    assert done.returncode == 0, done.stderr
    (wheel,) = target.iterdir()
    assert wheel.name.endswith(
        f"-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}.whl"
    )
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "charlm = charlm.cli:main" in file.read(entry_points).decode()
    files = ("libfused_lstm.so", MODULE, "py.typed", "_C.pyi")
    assert {f"fused_lstm/{name}" for name in files} <= names
    packages = {"fused_lstm": "fused_lstm", "charlm": "python/charlm"}
    for package, folder in packages.items():
        for path in [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.toml")]:
            assert f"{package}/{path.relative_to(ROOT / folder)}" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(packages)
    assert not any("gone" in name for name in names)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sdist_builds_and_runs(sdist: Path, tmp_path: Path) -> None:
    """The one build with the real compiler."""
    shutil.rmtree(sdist / "build", ignore_errors=True)
    done = build_hook(sdist, f"b.build_wheel({str(tmp_path)!r})")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    program = (
        "import torch, fused_lstm\n"
        "lstm = fused_lstm.FusedLSTM(3, 5)\n"
        "lstm(torch.randn(7, 2, 3))[0].sum().backward()\n"
        "print(fused_lstm.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "site" / "fused_lstm" / "__init__.py")
