"""`explain(lstm, input, ...)`: what serves one call, forward and backward, and why no other."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _C, cuda, lookup
from .backends import NAMES, Backend, choose, forced, refusal, thread_limit, threads
from .functional import Call, Refusal, States, is_recorded, is_stack, transform
from .module import Embedding, FusedLSTM

STOCK = "torch.nn.LSTM"


@dataclass(frozen=True)
class Explanation:
    """What `explain()` returns. `str()` of it is a table for people; by name it gives a backend's
    line, whose `available` says whether that one serves the call."""

    backend: str | None  # "torch.nn.LSTM" where its own code answers; None where an error does
    reason: str  # for that, or what the error says
    forced: str | None
    transform: str | None  # that is under way: torch.func or forward-mode AD
    table: tuple[Backend, ...] = ()  # empty where no backend is asked for
    # Only of a call that a backend serves:
    sizes: str = ""
    dtype: torch.dtype | None = None  # that it is computed in
    results: tuple[torch.dtype, ...] = ()  # of output, h_n, c_n
    input: str = ""  # of an embedding: what becomes of the ids
    threads: str = ""  # of the CPU
    forward: str = ""
    backward: str = ""

    def __getitem__(self, name: str) -> Backend:
        return next(line for line in self.table if line.name == name)

    def __str__(self) -> str:
        lines = []
        if self.backend == STOCK:
            lines.append(f"{STOCK}'s own code answers: {self.reason}")
        elif self.backend is None:
            lines.append(f"RuntimeError: {self.reason}")
        if self.table:
            lines += ["backend    serves", *(line.row() for line in self.table)]
        lines.append(f"forced: {self.forced or 'none, chosen for each call'}")
        if self.backend in NAMES:
            dtypes = zip(("output", "h_n", "c_n"), map(_name, self.results), strict=True)
            facts = {
                "sizes": self.sizes,
                "dtype": _name(self.dtype),
                "results": ", ".join(map(" ".join, dtypes)),
                "input": self.input,
                "transform": self.transform or "none",
                "threads": self.threads,
                "forward": self.forward,
                "backward": self.backward,
            }
            lines += ["", *(f"{key:<12} {value}" for key, value in facts.items() if value)]
        return "\n".join(lines)


def explain(
    lstm: FusedLSTM,
    input: Tensor | PackedSequence,
    hx: States | None = None,
    *,
    embedding: Embedding = None,
) -> Explanation:
    """What would serve `lstm(input, hx, embedding=embedding)` here and now: under this autocast, in
    this `backend(...)`, inside this transform, with gradients on or off.

    Nothing is computed and no random number drawn, but for what an embedding makes of ids; what
    dtypes nn.LSTM has under autocast is asked of its smallest call, once, as the call itself does.

    Raises:
        TypeError: `lstm` is no FusedLSTM.
    """
    if not isinstance(lstm, FusedLSTM):
        raise TypeError(f"explain() takes a FusedLSTM, and this is of type {type(lstm).__name__}")
    here = (forced(), transform())
    of_ids = ""
    try:
        if embedding is None:
            call = _prepared(lstm, input, hx)
        else:
            why = lookup.refusal(input, embedding)
            of_ids = (
                f"rows of the embedding: {why}" if why else "ids: W_ih multiplies the embedding"
            )
            input, ids = lookup.look_up(input, embedding)
            call = _prepared(lstm, input, hx)
            if ids is not None:
                ids.give(call)
    except Refusal as refused:
        return Explanation(STOCK, str(refused), *here)
    except RuntimeError as error:
        return Explanation(None, str(error), *here)
    return replace(_explanation(call, *here), input=of_ids)


def _prepared(lstm: FusedLSTM, input: Tensor | PackedSequence, hx: States | None) -> Call:
    data: Any = input
    batch_sizes = None
    if isinstance(input, PackedSequence):  # states in the order of its rows have the same shapes
        data, batch_sizes = input.data, input.batch_sizes
    return lstm._prepare(data, batch_sizes, hx)


def _explanation(call: Call, forced: str | None, under_way: str | None) -> Explanation:
    asked = (call.input, call.dtype, under_way)
    chosen: str | None = None
    try:
        chosen = choose(*asked)
        reason = "forced" if forced else "the first that can"
    except RuntimeError as error:
        reason = str(error)
    passed_over = f"{forced!r} is forced" if forced else f"{chosen!r} comes first"
    table = tuple(
        Backend(name, True, reason)
        if name == chosen
        else Backend(name, False, refusal(name, *asked) or passed_over)
        for name in NAMES
    )
    if chosen is None:
        return Explanation(None, reason, forced, under_way, table)
    return Explanation(
        chosen,
        reason,
        forced,
        under_way,
        table,
        _sizes(call),
        call.dtype,
        tuple(call.results or [call.dtype] * 3),
        threads=f"at most {threads()}" if chosen == "cpu" else "",
        forward=_forward(chosen, call),
        backward=_backward(chosen, call),
    )


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes(call: Call) -> str:
    options = call.options
    found = {
        "T": _steps(call),
        "B": call.batch,
        "I": options.input_size,
        "H": options.hidden_size,
        "P": options.proj_size or None,
        "layers": options.num_layers,
        "directions": call.directions,
        "packed rows": None if call.batch_sizes is None else call.input.shape[0],
    }
    return ", ".join(f"{name} {size}" for name, size in found.items() if size is not None)


def _steps(call: Call) -> int:
    return (call.input if call.batch_sizes is None else call.batch_sizes).shape[0]


# --- how a layer is computed ----------------------------------------------------------------------


def _forward(backend: str, call: Call) -> str:
    if backend == "reference":
        return "torch's operators, step by step"
    return _plan(backend, "forward", call)


def _backward(backend: str, call: Call) -> str:
    if transform():
        return "torch's, operator by operator, as the transform asks for it"
    if not torch.is_grad_enabled():
        return "none: gradients are off"
    if not is_recorded(call):
        return "none: nothing here requires a gradient"
    if backend == "reference":
        return "torch's, operator by operator"
    return _plan(backend, "backward", call)


def _plan(backend: str, pass_: str, call: Call) -> str:
    """How a backend's kernels run a pass of a layer."""
    device = call.input.device
    if device.type == "meta":
        return "nothing runs: tensors on meta are shapes only"
    if call.batch == 0:
        return "nothing runs: there are no sequences"
    if backend == "cpu":
        return f"kernels of {_C.cpu_isa()}{', layers at once' * layers_at_once(call)}"
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        return "nothing runs: no GPU is visible"
    return _cuda_plan(pass_, call) if backend == "cuda" else _triton_plan(pass_, call)


def layers_at_once(call: Call) -> bool:
    """Whether threads of the CPU are at different layers, csrc/cpu/wavefront.h."""
    options, batch = call.options, call.batch
    sizes = (_steps(call), batch, options.input_size, options.hidden_size, call.h_size)
    return (
        is_stack(call)
        and call.directions == 1
        and _C.cpu_wavefront(_name(call.dtype), *sizes, options.num_layers, thread_limit())
    )


def _cuda_plan(pass_: str, call: Call) -> str:
    # csrc/cuda/host.cpp asks for no plan for these.
    if pass_ == "forward" and not call.options.proj_size:
        elements = sum(weight.numel() for weight in call.weights[:2])
        if _C.cuda_single(_steps(call), call.batch, elements * call.dtype.itemsize):
            return "one launch: both products and the cell"
    if call.dtype is torch.float64 or call.options.proj_size:
        why = "float64" if call.dtype is torch.float64 else "proj_size"
        return f"a product and a fused cell for each step: {why}"
    operands = "tf32" if call.dtype is torch.float32 and cuda.tf32() else _name(call.dtype)
    sizes = (_steps(call), call.batch, call.options.hidden_size, call.directions)
    with torch.cuda.device(call.input.device):
        return _C.cuda_plan(pass_, operands, *sizes)


def _triton_plan(pass_: str, call: Call) -> str:
    from .triton.layer import plan_on  # imports Triton
    from .triton.plan import describe

    sizes = (call.options.hidden_size, call.batch, call.directions, call.h_size)
    return describe(plan_on(call.input.device, pass_ == "backward", sizes, call.dtype))
