"""Which backend serves a call, and why the others don't.

Importing this module loads the compiled part (`fused_lstm._C`), which registers the operators.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"fused_lstm's compiled part does not load beside torch {torch.__version__} "
        f"(it is missing, or was built against another torch); "
        f"run `pip install --force-reinstall --no-deps .` in its source folder: {error}"
    ) from error


def _release(version: str) -> tuple[str, ...]:
    """("2", "13") of "2.13.0+cpu": what decides whether compiled code fits."""
    return tuple(version.split(".")[:2])


if _release(_C.build_info()["torch"]) != _release(torch.__version__):
    raise ImportError(
        f"fused_lstm was built against torch {_C.build_info()['torch']} and can't run with torch "
        f"{torch.__version__}; run `pip install --force-reinstall --no-deps .` in its source folder"
        f" (tested with torch {_C.build_info()['tested'].replace(' ', ', ')})"
    )

from . import cuda, triton  # noqa: E402  the first asks the compiled part at once

KERNEL_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
NAMES = ("cpu", "cuda", "triton", "reference")

_forced: str | None = None  # read on every call, and guarded on by TorchDynamo


def _checked(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"unknown backend {name!r}, expected one of: {', '.join(NAMES)}")
    return name


if os.environ.get("FUSED_LSTM_BACKEND"):
    _forced = _checked(os.environ["FUSED_LSTM_BACKEND"])
if os.environ.get("FUSED_LSTM_CPU") not in (None, "", _C.cpu_isa()):
    _C.force_cpu_isa(os.environ["FUSED_LSTM_CPU"])  # says what it could have been


class backend:
    """Context manager that forces one backend for every call made inside it, in every thread.

    The environment variable FUSED_LSTM_BACKEND does the same for a process.

    Args:
        name: "cpu", "cuda", "triton" or "reference".

    Raises:
        ValueError: the name is none of these. A call that the forced backend can't serve raises
            RuntimeError saying why.
    """

    def __init__(self, name: str) -> None:
        self._name = _checked(name)

    def __enter__(self) -> None:
        global _forced
        self._before = _forced
        _forced = self._name

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _forced
        _forced = self._before


def forced() -> str | None:
    """The backend that every call is to be served by."""
    return _forced


def choose(input: Tensor, dtype: torch.dtype, transform: str | None) -> str:
    """The name of the backend that serves a call: the forced one, or the first that can.

    Args:
        input: of the call.
        dtype: that it is computed in.
        transform: the torch.func transform or forward-mode AD that is under way.

    Raises:
        RuntimeError: a backend is forced that can't serve the call.
    """
    for name in NAMES if _forced is None else (_forced,):
        reason = refusal(name, input, dtype, transform)
        if reason is None:
            return name
    raise RuntimeError(f"the forced backend {_forced!r} can't serve this call: {reason}")


def refusal(name: str, input: Tensor, dtype: torch.dtype, transform: str | None) -> str | None:
    """Why a backend can't serve a call, as `choose` has it; None where it can."""
    if name == "reference":
        return None
    reason: str | None = None
    if name == "cpu":
        if not (input.is_cpu or input.is_meta):  # `meta` needs only the shapes
            reason = f"it serves tensors on the CPU, and this one is on {input.device}"
    elif name == "cuda":
        reason = cuda.refusal(input)
    else:
        reason = triton.refusal(input)
    if reason is not None:
        return reason
    if dtype not in KERNEL_DTYPES:
        return f"it does not serve {dtype}"
    if transform is not None:
        return "torch.func transforms and forward-mode AD need the backend 'reference'"
    return None


@dataclass(frozen=True)
class Backend:
    """One line of a table: `detail` is what it serves, or why it is not available."""

    name: str
    available: bool
    detail: str

    def row(self) -> str:
        return f"{self.name:<10} {'yes' if self.available else 'no':<10} {self.detail}"


@dataclass(frozen=True)
class Backends:
    """What `backends()` returns. `str()` of it is a table for people; by name it gives a line."""

    table: tuple[Backend, ...]
    forced: str | None
    instruction_sets: tuple[tuple[str, bool], ...]
    instruction_set: str
    threads: str
    build: dict[str, str]

    def __getitem__(self, name: str) -> Backend:
        return next(line for line in self.table if line.name == _checked(name))

    def __iter__(self) -> Iterator[Backend]:
        return iter(self.table)

    def __str__(self) -> str:
        lines = ["backend    available", *(line.row() for line in self.table)]
        lines.append(f"forced: {self.forced or 'none, chosen for each call'}")
        lines.append("")
        lines.append("CPU instruction sets built, slowest first")
        for name, supported in self.instruction_sets:
            state = "yes" if supported else "no: this processor does not offer it"
            lines.append(f"{name:<12} {'in use' if name == self.instruction_set else state}")
        lines.append(f"{'threads':<12} {self.threads}")
        lines.append("")
        lines.append("build")
        for key, value in self.build.items():
            lines.append(f"{key:<12} {value}")
        return "\n".join(line.rstrip() for line in lines)


def thread_limit() -> int:
    """How many threads a large call on the CPU takes."""
    return _C.thread_limit(torch.get_num_threads(), **_C.processors())


def threads() -> str:
    """The same, and what limits them."""
    wanted, facts = torch.get_num_threads(), _C.processors()
    words = [f"torch has {wanted}", f"processors {facts['affinity']}"]
    if facts["quota"]:
        words.append(f"control groups grant {facts['quota']:g}")
    if facts["cap"]:
        words.append(f"FUSED_LSTM_THREADS {facts['cap']}")
    if facts["forked"]:
        words.append("a forked child takes one")
    return f"{thread_limit()} of torch's: {', '.join(words)}"


def backends() -> Backends:
    """The backends, which of them are available or why not, and the facts of this build."""
    return Backends(
        table=(
            Backend(
                "cpu",
                True,
                f"CPU tensors in float32, float64, bfloat16 and float16, with {_C.cpu_isa()}",
            ),
            Backend("cuda", *cuda.available()),
            Backend("triton", *triton.available()),
            Backend(
                "reference",
                True,
                "plain PyTorch: any device and dtype, torch.func, forward-mode AD, double backward",
            ),
        ),
        forced=_forced,
        instruction_sets=tuple(_C.cpu_isas()),
        instruction_set=_C.cpu_isa(),
        threads=threads(),
        build=dict(_C.build_info()),
    )
