"""The stages of `python -m benchmarks.gpu` that run other programs; each returns what it found.

Facts have `state`: "done", "failed", "cut" (at its time limit) or "skipped", with `why`, and
`seconds`. None of these functions raises for what the machine lacks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, without_paths
from benchmarks.process import Done, run

Facts = dict[str, Any]

PYTHON = ROOT / "python"
MICRO = Path(__file__).with_name("micro.cu")
# Ignored by git, and in the checkout, so that a second run there builds on what the first made.
PACKAGE = ROOT / "build" / "gpu-package"
SHOWN = 20  # failures, errors: of more, the log tells


def skipped(why: str) -> Facts:
    return {"state": "skipped", "seconds": 0.0, "why": why}


def first(lines: list[str], pattern: str) -> list[str]:
    """The first lines that match, without this machine's paths."""
    found = [line for line in lines if re.search(pattern, line)]
    return [without_paths(line.strip())[:300] for line in found[:SHOWN]]


def build(architecture: str, log: Path, limit_s: float, package: Path = PACKAGE) -> Facts:
    """Install the checkout into `package`, which this and later processes import from first, with
    the CUDA kernels for this architecture, such as "9.0a"."""
    environment = {"FUSED_LSTM_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    environment["MAX_JOBS"] = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-v", "--upgrade",
           "--no-build-isolation", "--no-deps", "--target", str(package), "."]  # fmt: skip
    done = run(pip, log, limit_s, cwd=ROOT, **environment)
    facts: Facts = {"state": done.state, "seconds": done.seconds, **environment}
    if done.state != "done":
        return {**facts, "errors": first(done.lines, r"error|Error|fatal")}
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(package), *([before] if before else [])])
    sys.path.insert(0, str(package))
    return facts


def program(name: str) -> str | None:
    """A program of the CUDA toolkit: on the PATH, as CUDA_HOME says, or where it is installed."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)
    folders = [str(Path(home, "bin")) for home in homes if home]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def micro(architecture: str, log: Path, limit_s: float, *options: str) -> Facts:
    """What micro.cu measures, compiled for an architecture such as "9.0a": {"measured": {name:
    {"value", "unit"} or {"error"}}}."""
    compiler = program("nvcc")
    if compiler is None:
        return skipped("nvcc was not found")
    number = architecture.replace(".", "")
    target = f"arch=compute_{number},code=sm_{number}"
    with tempfile.TemporaryDirectory() as folder:
        binary = str(Path(folder, "micro"))
        command = [compiler, "-std=c++17", "-O3", "-I", str(ROOT / "csrc"), "-gencode", target,
                   *options, str(MICRO), "-o", binary]  # fmt: skip
        compiled = run(command, log, limit_s)
        if compiled.state != "done":
            return {"state": compiled.state, "errors": first(compiled.lines, "error")}
        done = run([binary], log, max(limit_s - compiled.seconds, 1))
    return {"state": done.state, "seconds": done.seconds, "measured": measurements(done.lines)}


def measurements(lines: list[str]) -> Facts:
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return {facts.pop("name"): facts for facts in found}


# What is tested, the most telling first, each in a process of its own: a limit cuts the last.
SELECTIONS: dict[str, tuple[str, ...]] = {
    "hidden sizes": ("tests/test_gpu.py", "-k", "test_hidden_sizes"),
    "contract": ("tests/test_gpu_contract.py",),
    "some options": ("tests/test_gpu.py", "-k", "test_options", "--every", "16"),
    "sizes and strides": ("tests/test_gpu.py", "-k", "not test_hidden_sizes and not test_options"),
    "other files": ("tests", "-m", "gpu", "--ignore=tests/test_gpu.py",
                    "--ignore=tests/test_gpu_contract.py"),
    "all options": ("tests/test_gpu.py", "-k", "test_options"),
}  # fmt: skip
PYTEST = ("-m", "pytest", "-v", "--tb=short", "--maxfail=20", "--continue-on-collection-errors",
          "-o", "timeout=60", "-p", "no:cacheprovider")  # fmt: skip
GPU_LOST, NO_TESTS = 86, 5  # exit statuses: tests/conftest.py's after a trap, and pytest's
ENDED = re.compile(r"(\S+\.py::.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def tests(log: Path, limit_s: float, selections: dict[str, tuple[str, ...]] = SELECTIONS) -> Facts:
    """The tests that are marked for a GPU, in the checkout, against the package in use; a selection
    is begun anew behind a test that lost the process its GPU.

    How many passed and which failed is told by the line that each leaves when it ends, for a run
    that is cut has no summary."""
    start = time.monotonic()
    lines: list[str] = []
    states = dict.fromkeys(selections, "cut")
    for name, select in selections.items():
        after: tuple[str, ...] = ()
        while (left := start + limit_s - time.monotonic()) > 1:
            command = [sys.executable, *PYTEST, *select, *after]
            done = run(command, log, left, cwd=ROOT, PYTEST_ADDOPTS="")  # -n has other lines
            lines += done.lines
            states[name] = "skipped" if done.code == NO_TESTS and not after else done.state
            ended = [match[1] for line in done.lines if (match := ENDED.match(line))]
            if done.code != GPU_LOST or not ended or ended[-1] in after:
                break
            after = ("--after", ended[-1])
    counts = Counter(match[2].lower() for line in lines if (match := ENDED.match(line)))
    failures = first(lines, r"\.py::.* (FAILED|ERROR)\b|^ERROR ")
    all_ = set(states.values()) | ({"failed"} if failures else set())
    return {
        "state": next((s for s in ("failed", "cut", "done") if s in all_), "skipped"),
        "seconds": round(time.monotonic() - start, 1),
        "outcomes": dict(counts),
        "failures": failures,
        "selections": states,
    }


# compute-sanitizer's tools and the dtypes that it checks, the most used first.
CHECKED = [(tool, dtype) for dtype in ("fp16", "fp32", "tf32", "bf16", "fp64")
           for tool in ("memcheck", "racecheck", "synccheck")]  # fmt: skip


def sanitizer(log: Path, limit_s: float) -> Facts:
    """What compute-sanitizer finds in the suite `odd`, for each tool and dtype in a process."""
    checker = program("compute-sanitizer")
    if checker is None:
        return skipped("compute-sanitizer was not found")
    found: Facts = {}
    end = time.monotonic() + limit_s
    for at, (tool, dtype) in enumerate(CHECKED):
        left = (end - time.monotonic()) / (len(CHECKED) - at)  # what one leaves is the others'
        # What torch probes for and does without isn't an error; what it can't do without, it says.
        options = ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [checker, "--tool", tool, "--error-exitcode", "86", *options,
                   sys.executable, "-m", "benchmarks.lstm", "--suite=odd", f"--dtype={dtype}",
                   "--device=cuda", "--backend=cuda"]  # fmt: skip
        # Each tensor in an allocation of its own, or a write past its end would be inside torch's.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        found[f"{tool} {dtype}"] = checked(run(command, log, max(left, 1), cwd=PYTHON, **alone))
    return found


def checked(done: Done) -> Facts:
    """compute-sanitizer's verdict; it can only be "done" where its summary says that all is well.

    On some virtual machines the tool can't reach the GPU: that says nothing about the kernels.
    """
    summaries = [line.strip("= ") for line in done.lines if "SUMMARY" in line]
    facts: Facts = {"state": done.state, "seconds": done.seconds, "summary": summaries[-1:]}
    facts["right"] = sum("distance " in line for line in done.lines)
    if any("Device not supported" in line for line in done.lines):
        return {**facts, "state": "skipped", "why": "Device not supported"}
    if done.code == 0 and not summaries:
        return {**facts, "state": "failed", "why": "no summary"}
    if done.state != "done":
        facts["errors"] = first(done.lines, r"^=====+ +[A-Z]|Error")
    return facts
