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
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.process import Done, run

Facts = dict[str, Any]

PYTHON = report.ROOT / "python"
MICRO = Path(__file__).with_name("micro.cu")
# Ignored by git, and in the checkout, so that a second run there builds on what the first made.
PACKAGE = report.ROOT / "build" / "gpu-package"
BUILD_S = 180  # what a build may take
STAGES = ("build", "micro", "headline", "tests", "sanitizer", "suite")
SHOWN = 20  # failures, errors: of more, the log tells


def skipped(why: str) -> Facts:
    return {"state": "skipped", "seconds": 0.0, "why": why}


def architecture(capability: str) -> str:
    """What to compile for on a GPU of this capability: "9.0a" for "9.0"."""
    return "9.0a" if capability == "9.0" else capability


def build(capability: str | None, log: Path, limit_s: float, package: Path = PACKAGE) -> Facts:
    """Install the checkout into `package` (added to what this and later processes import), with
    the CUDA kernels for this capability; with None, without them."""
    jobs = str(os.cpu_count() or 1)
    environment = {"MAX_JOBS": os.environ.get("MAX_JOBS", jobs), "FUSED_LSTM_CUDA": "0"}
    if capability is not None:
        environment["FUSED_LSTM_CUDA"] = "1"
        environment["TORCH_CUDA_ARCH_LIST"] = architecture(capability)
    from_scratch = not any((report.ROOT / "build").glob("**/*.o"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-v", "--upgrade",
           "--no-build-isolation", "--no-deps", "--target", str(package), "."]  # fmt: skip
    done = run(pip, log, limit_s=limit_s, cwd=report.ROOT, environment=environment)
    facts: Facts = {
        "state": done.state,
        "seconds": done.seconds,
        "within_limit": done.seconds < BUILD_S,
        "from_scratch": from_scratch,
        **environment,
    }
    if done.state == "done":
        use(package)
        sizes = (file.stat().st_size for file in package.glob("fused_lstm/*.so"))
        facts["libraries_mib"] = report.significant(sum(sizes) / 2**20)
    else:
        facts["errors"] = first(done.lines, r"error|Error|fatal")
    return facts


def use(package: Path) -> None:
    """Import from this folder first, here and in every process that is started from here."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(package), *([before] if before else [])])
    sys.path.insert(0, str(package))


def nvcc() -> str | None:
    return program("nvcc", os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))


def program(name: str, *homes: str | None) -> str | None:
    """A program of the CUDA toolkit: on the PATH, in one of `homes`, or where it is installed."""
    folders = [Path(home, "bin") for home in (*homes, "/usr/local/cuda") if home]
    folders += sorted(Path("/usr/local").glob("cuda-*/bin"), reverse=True)
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, folders)))


def compile_micro(
    binary: Path, architecture: str, log: Path, limit_s: float, *options: str
) -> Facts:
    """micro.cu for one architecture, such as "9.0a"."""
    compiler = nvcc()
    if compiler is None:
        return skipped("nvcc was not found")
    number = architecture.replace(".", "")
    target = f"arch=compute_{number},code=sm_{number}"
    command = [compiler, "-std=c++17", "-O3", "-I", str(report.ROOT / "csrc"), "-gencode", target,
               *options, str(MICRO), "-o", str(binary)]  # fmt: skip
    done = run(command, log, limit_s=limit_s)
    facts: Facts = {"state": done.state, "seconds": done.seconds}
    return facts if done.state == "done" else {**facts, "errors": first(done.lines, "error")}


def micro(binary: Path, log: Path, limit_s: float) -> Facts:
    """What micro.cu measured: {"measured": {name: {"value", "unit", ...} or {"error"}}}."""
    done = run([str(binary)], log, limit_s=limit_s)
    return {"state": done.state, "seconds": done.seconds, "measured": measurements(done.lines)}


def measurements(lines: list[str]) -> Facts:
    found = {}
    for line in lines:
        try:
            facts = json.loads(line)
            found[facts.pop("name")] = facts
        except (ValueError, KeyError, TypeError):
            continue  # no measurement: the log has it
    return found


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
GPU_LOST = 86  # tests/conftest.py's exit status after a trap
ENDED = re.compile(r"(\S+\.py::.*) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")


def tests(log: Path, limit_s: float, selections: dict[str, tuple[str, ...]] = SELECTIONS) -> Facts:
    """The tests that are marked for a GPU, in the checkout, against the package in use."""
    start = time.monotonic()
    parts: dict[str, Facts] = {}
    for name, select in selections.items():
        left = start + limit_s - time.monotonic()
        parts[name] = _tested(select, log, left) if left > 1 else skipped("no time left")
    states = [part["state"] for part in parts.values()]
    outcomes = sum((Counter(part.get("outcomes", {})) for part in parts.values()), Counter())
    failures = [line for part in parts.values() for line in part.get("failures", ())]
    late = any(part.get("why") == "no time left" for part in parts.values())
    return {
        "state": "failed" if "failed" in states else "cut" if "cut" in states or late
        else "done" if "done" in states else "skipped",
        "seconds": round(time.monotonic() - start, 1),
        "outcomes": dict(outcomes),
        "failures": failures[:SHOWN],
        "selections": {name: f"{part['state']} after {part['seconds']} s"
                       for name, part in parts.items()},
    }  # fmt: skip


def _tested(select: tuple[str, ...], log: Path, limit_s: float) -> Facts:
    """One selection: begun anew behind a test that lost the process its GPU."""
    pytest = [sys.executable, "-m", "pytest", *select, "-v", "--tb=short", "--maxfail=20",
              "--continue-on-collection-errors", "-o", "timeout=60",
              "-p", "no:cacheprovider"]  # fmt: skip
    start = time.monotonic()
    lines: list[str] = []
    after: tuple[str, ...] = ()
    while True:
        left = start + limit_s - time.monotonic()
        done = run([*pytest, *after], log, limit_s=max(left, 1), cwd=report.ROOT)
        lines += done.lines
        ended = [match[1] for line in done.lines if (match := ENDED.match(line))]
        if done.code != GPU_LOST or not ended or left < 1 or ended[-1] in after:
            break
        after = ("--after", ended[-1])
    facts: Facts = {"state": done.state, "seconds": round(time.monotonic() - start, 1),
                    **outcomes(lines)}  # fmt: skip
    if facts["failures"]:
        facts["state"] = "failed"
    if done.code == 5 and not after:
        facts |= {"state": "skipped", "why": "no test is marked for a GPU"}
    return facts


def outcomes(lines: list[str]) -> Facts:
    """How many tests passed, failed and so on, and which did not: by the lines that each test
    leaves when it ends, for a run that is cut has no summary."""
    ended = [match for line in lines if (match := ENDED.match(line))]
    counts = Counter(match[2].lower() for match in ended)
    wrong = [match[0] for match in ended if match[2] in ("FAILED", "ERROR")]
    wrong += first(lines, r"^ERROR ") if not wrong else []  # what could not be collected
    return {"outcomes": dict(counts),
            "failures": [report.without_paths(line)[:300] for line in wrong[:SHOWN]]}  # fmt: skip


TOOLS = ("memcheck", "racecheck", "synccheck")
CHECKED = ("fp16", "fp32", "tf32", "bf16", "fp64")


def sanitizer(log: Path, limit_s: float, tools: tuple[str, ...] = TOOLS) -> Facts:
    """What compute-sanitizer finds in benchmarks.small_run: facts for each tool and dtype, one a
    process."""
    checker = program("compute-sanitizer", os.environ.get("CUDA_HOME"))
    if checker is None:
        return dict.fromkeys(tools, skipped("compute-sanitizer was not found"))
    found: Facts = {}
    end = time.monotonic() + limit_s
    runs = [(tool, dtype) for dtype in CHECKED for tool in tools]
    for at, (tool, dtype) in enumerate(runs):
        left = (end - time.monotonic()) / (len(runs) - at)  # what one leaves is the others'
        # What torch probes for and does without isn't an error; what it can't do without, it says.
        options = ["--report-api-errors", "no"] if tool == "memcheck" else []
        command = [checker, "--tool", tool, "--error-exitcode", "86", *options,
                   sys.executable, "-m", "benchmarks.small_run", "--dtype", dtype,
                   "--device", "cuda", "--backend", "cuda"]  # fmt: skip
        # Each tensor in an allocation of its own, or a write past its end would be inside torch's.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = run(command, log, limit_s=max(left, 1), cwd=PYTHON, environment=environment)
        found[f"{tool} {dtype}"] = checked(done)
    return found


def checked(done: Done) -> Facts:
    """compute-sanitizer's verdict; it can only be "done" where its summary says that all is well.

    On some virtual machines the tool can't reach the GPU: that says nothing about the kernels.
    """
    facts: Facts = {"state": done.state, "seconds": done.seconds}
    facts["right"] = sum(line.endswith(": right") for line in done.lines)
    if any("Device not supported" in line for line in done.lines):
        return {**facts, "state": "skipped", "why": "Device not supported"}
    summaries = [line.strip("= ") for line in done.lines if "SUMMARY" in line]
    facts["summary"] = summaries[-1] if summaries else None
    if done.code == 0 and not summaries:
        return {**facts, "state": "failed", "why": "no summary"}
    if done.state != "done":
        facts["errors"] = first(done.lines, r"^=====+ +[A-Z]|: wrong|Error")
    return facts


def first(lines: list[str], pattern: str) -> list[str]:
    """The first lines that match, without this machine's paths."""
    matching = (line for line in lines if re.search(pattern, line))
    return [report.without_paths(line.strip())[:300] for line in islice(matching, SHOWN)]
