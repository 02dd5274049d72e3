"""Facts a figure can't be read without: machine, versions, commit. No host name, no path."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent

# Of all the processor's flags, those an LSTM kernel could be written for (x86-64, then arm64).
INSTRUCTION_SETS = (
    "avx2 fma f16c avx_vnni avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 avx512_fp16 "
    "amx_tile amx_bf16 amx_fp16 asimd asimdhp asimddp bf16 i8mm sve sve2 sme"
).split()


def machine(device: str) -> dict[str, Any]:
    """Processor and, for a CUDA device, the GPU."""
    cpu, (backends, _) = _lscpu(), library()
    # torch knows arm's and Apple's names too, but only lately.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    # Virtual machines often hide the model in the name; these three numbers still tell it.
    family = [cpu.get(key, "") for key in ("CPU family", "Model", "Stepping")]
    cores = [cpu.get(key, "") for key in ("Socket(s)", "Core(s) per socket")]
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    facts: dict[str, Any] = {
        "processor": capabilities.get("cpu_name") or cpu.get("Model name") or platform.machine(),
        "family_model_stepping": "/".join(family) if all(family) else None,
        "cores": math.prod(int(of) if of.isdigit() else 0 for of in cores) or os.cpu_count(),
        "cpus_usable": len(affinity(0)),
        "caches": {key[:3].strip(): of for key, of in cpu.items() if key.endswith(" cache")},
        "instruction_sets": [of for of in cpu.get("Flags", "").split() if of in INSTRUCTION_SETS],
        "instruction_set": backends and backends.instruction_set,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts["gpu"] = gpu.name
        facts["gpu_capability"] = f"{gpu.major}.{gpu.minor}"
        facts["gpu_processors"] = gpu.multi_processor_count
        facts["gpu_memory_gib"] = round(gpu.total_memory / 2**30)
    return facts


def name(facts: dict[str, Any]) -> str:
    """What a result is told apart by: the GPU, or the processor, its family and model, the
    instruction set that fused_lstm uses on it, and its cores. Names alone don't do: "AMD EPYC" has
    AVX2 or AVX-512, and a virtual machine hides the rest of it."""
    if facts.get("gpu"):
        return facts["gpu"]
    processor = re.sub(r"\((r|tm)\)", "", facts["processor"], flags=re.IGNORECASE)
    family = (facts.get("family_model_stepping") or "").rpartition("/")[0]
    cores = f"{facts['cores']} cores" if facts.get("cores") else None
    parts = (f"{processor} {family}".strip(), facts.get("instruction_set"), cores)
    return ", ".join(filter(None, parts))


def slug(facts: dict[str, Any]) -> str:
    """The name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name(facts).lower()).strip("-")


def library() -> tuple[Any, str]:
    """fused_lstm.backends() and its version, or None and why it can't be loaded: nn.LSTM is
    measured alone on a machine where it isn't built."""
    try:
        from fused_lstm import backends

        found = [of.version for of in metadata.distributions(name="fused_lstm")]
        return backends(), found[0] if found else "not installed"
    except (ImportError, OSError) as error:
        words = without_paths(str(error)).partition("\n")[0]
        return None, f"fused_lstm can't be imported: {words}"


def unavailable(names: tuple[str, ...]) -> dict[str, str]:
    """Which of these backends can't be measured, and why."""
    backends, why = library()
    if backends is None:
        return dict.fromkeys(names, why)
    there = {line.name: line for line in backends.table}
    missing = {name: f"unknown backend {name!r}" for name in names if name not in there}
    return missing | {n: of.detail for n, of in there.items() if n in names and not of.available}


def versions(device: str) -> dict[str, Any]:
    """Versions, and the lines of `fused_lstm.backends()`: what was built, by which compiler."""
    backends, version = library()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fused_lstm": version,
    }
    if backends:
        facts["backends"] = str(backends).splitlines()
    if device == "cuda":
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return facts


def commit(folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """The commit of the checkout that `folder` is in, and whether anything but results differs
    from it ("dirty"); empty where there is no git or no commit."""
    # A read-only look: no lock is taken, so it can't get in the way of another git.
    git = ("git", "--no-optional-locks", "-C", str(folder))
    status = ("status", "--porcelain", "--", ":/", ":(top,exclude)python/benchmarks/results")
    try:
        head = _output(*git, "rev-parse", "--short=12", "HEAD")
        return {"commit": head, "dirty": bool(_output(*git, *status))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def without_paths(text: str) -> str:
    """The same text with this machine's folders taken out: results are published."""
    folders = {str(ROOT): ".", sys.prefix: "<python>", sys.base_prefix: "<python>",
               str(Path.home()): "~"}  # fmt: skip
    for folder in sorted(folders, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(folder, folders[folder])
    return text


def _lscpu() -> dict[str, str]:
    """What Linux says of its processor; empty elsewhere."""
    try:
        text = _output("env", "LC_ALL=C", "lscpu")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(re.findall(r"^ *([^:\n]+): +(.+)$", text, re.MULTILINE))


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()
