"""Facts a figure can't be read without: machine, versions, commit. No host name, no path."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import report

# Of all the processor's flags, those an LSTM kernel could be written for (x86-64, then arm64).
INSTRUCTION_SETS = [
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "asimd", "asimdhp", "asimddp",
    "bf16", "i8mm", "sve", "sve2", "sme",
]  # fmt: skip

# Settings that change how fast either side runs.
ENVIRONMENT = [
    "FUSED_LSTM_BACKEND", "FUSED_LSTM_CPU", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA",
    "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME", "KMP_AFFINITY", "MKL_NUM_THREADS", "CUDA_LAUNCH_BLOCKING",
]  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """Processor and, for a CUDA device, the GPU."""
    cpuinfo = _cpuinfo()
    facts: dict[str, Any] = {
        "processor": _processor_name(cpuinfo),
        "family_model_stepping": _family(cpuinfo),
        "cores": _cores(cpuinfo),
        "cpus_usable": _cpus_usable(),
        "caches": _caches(),
        "instruction_sets": _instruction_sets(cpuinfo),
        "instruction_set": _instruction_set(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
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
    parts = [re.sub(r"\((r|tm)\)", "", facts["processor"], flags=re.IGNORECASE)]
    if facts.get("family_model_stepping"):
        parts[0] += " " + facts["family_model_stepping"].rpartition("/")[0]
    if facts.get("instruction_set"):
        parts.append(facts["instruction_set"])
    if facts.get("cores"):
        parts.append(f"{facts['cores']} cores")
    return ", ".join(parts)


def slug(facts: dict[str, Any]) -> str:
    """The name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name(facts).lower()).strip("-")


def versions(device: torch.device) -> dict[str, Any]:
    """Versions, and the lines of `fused_lstm.backends()`: what was built, by which compiler."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **library(),
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["cudnn"] = torch.backends.cudnn.version()
    return facts


def library() -> dict[str, Any]:
    """fused_lstm's version and the lines of its table, or why it can't be loaded: nn.LSTM is
    measured alone on a machine where it isn't built."""
    try:
        from fused_lstm import backends

        lines = str(backends()).splitlines()
        return {"fused_lstm": metadata.version("fused_lstm"), "backends": lines}
    except (ImportError, OSError, metadata.PackageNotFoundError) as error:
        words = str(error).partition("\n")[0]
        return {"fused_lstm": report.without_paths(f"can't be imported: {words}")}


def environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def load() -> float | None:
    """Processes that wanted a core in the last minute: what else the machine was doing."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def taken_by_others() -> float | None:
    """Seconds of all cores that other programs have had so far; None where that is not told."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; what follows is in user already.
    taken = sum(int(ticks) for at, ticks in enumerate(fields[1:9]) if at not in (3, 4))
    return taken / os.sysconf("SC_CLK_TCK") - time.process_time()


def commit(folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """The commit of the checkout that `folder` is in, and whether anything but results differs
    from it ("dirty"); empty where there is no git or no commit."""
    # A read-only look: no lock is taken, so it can't get in the way of another git.
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    status = ["status", "--porcelain", "--", ":/", ":(top,exclude)python/benchmarks/results"]
    try:
        head = _output([*git, "rev-parse", "--short=12", "HEAD"])
        return {"commit": head, "dirty": bool(_output([*git, *status]))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def document(benchmark: str, suite: str, device: torch.device, threads: int) -> dict[str, Any]:
    """A report of this process and this machine, without rows yet: report.py says what is in it."""
    return {
        "format": report.FORMAT,
        "benchmark": benchmark,
        "suite": suite,
        "device": device.type,
        "threads": threads,
        "machine": machine(device),
        "versions": versions(device),
        "environment": environment(),
        "load": load(),
        **commit(),
        "rows": [],
    }


def _output(command: list[str]) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _cpuinfo() -> list[dict[str, str]]:
    """/proc/cpuinfo, one dict for each processor; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    blocks = [re.findall(r"^([^\t:]+)\s*:[ \t]*(.*)$", b, re.MULTILINE) for b in text.split("\n\n")]
    return [dict(block) for block in blocks if block]


def _processor_name(cpuinfo: list[dict[str, str]]) -> str:
    # torch knows arm's and Apple's names too, but only lately.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    listed = cpuinfo[0].get("model name") if cpuinfo else None
    return capabilities.get("cpu_name") or listed or platform.processor() or platform.machine()


def _family(cpuinfo: list[dict[str, str]]) -> str | None:
    """Virtual machines often hide the model in the name; these three numbers still tell it."""
    names = ("cpu family", "model", "stepping")
    if cpuinfo and all(name in cpuinfo[0] for name in names):
        return "/".join(cpuinfo[0][name] for name in names)
    return None


def _cores(cpuinfo: list[dict[str, str]]) -> int | None:
    cores = {(c.get("physical id"), c["core id"]) for c in cpuinfo if "core id" in c}
    return len(cores) or os.cpu_count()


def _cpus_usable() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _caches() -> dict[str, str]:
    """Of the first processor, such as {"L1d": "48K", "L2": "1024K"}; empty where not told."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        caches[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return caches


def _instruction_set() -> str | None:
    """The one that fused_lstm uses; None where it can't be loaded."""
    try:
        from fused_lstm import backends
    except (ImportError, OSError):
        return None
    return backends().instruction_set


def _instruction_sets(cpuinfo: list[dict[str, str]]) -> list[str]:
    if not cpuinfo:
        return []
    flags = (cpuinfo[0].get("flags") or cpuinfo[0].get("Features") or "").split()
    return [name for name in INSTRUCTION_SETS if name in flags]
