"""`explain`: what it says of a call is what the call does, for every reason there is."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_backends import Served
from test_errors import assigned, packed, states
from torch import Tensor, nn, randn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lstm import _C, FusedLSTM, backend, backends, cuda, explain, functional, module, triton
from fused_lstm.functional import Refusal
from fused_lstm.triton.plan import Device, describe, plan

inside = importlib.import_module("fused_lstm.explain")  # whose name in the package is a function's
X = (5, 2, 4)


# --- nn.LSTM's own code ---------------------------------------------------------------------------

Call = tuple[nn.Module, Any]  # a module, and what it is called with
# By the reason.
STOCK: dict[str, Callable[[], Call]] = {
    "there are 8 weights, not 12 as for its options": lambda: (
        assigned(FusedLSTM(4, 3, 2), num_layers=3),
        (randn(X),),
    ),
    "weight_hh_l0 is None": lambda: (assigned(FusedLSTM(4, 3), weight_hh_l0=None), (randn(X),)),
    "the input has 1 dimensions, not 2 or 3": lambda: (FusedLSTM(4, 3), (randn(4),)),
    "the input has no steps": lambda: (FusedLSTM(4, 3), (randn(0, 2, 4),)),
    "the input has 7 features, not 4": lambda: (FusedLSTM(4, 3), (randn(5, 2, 7),)),
    "packed rows have 2 dimensions, and these 3": lambda: (
        FusedLSTM(4, 3),
        (packed(data=randn(9, 1, 4)),),
    ),
    "batch_sizes is not a tensor of one dimension": lambda: (
        FusedLSTM(4, 3),
        (packed(batch_sizes=torch.tensor([[3, 2, 2, 1, 1]])),),
    ),
    "batch_sizes is not int64 on the CPU": lambda: (
        FusedLSTM(4, 3),
        (packed(batch_sizes=torch.tensor([3, 2, 2, 1, 1]).int()),),
    ),
    "batch_sizes must be positive, never increase and sum to the 9 rows": lambda: (
        FusedLSTM(4, 3),
        (packed(batch_sizes=torch.tensor([1, 2, 3, 3])),),
    ),
    "hx is not a pair (h_0, c_0)": lambda: (FusedLSTM(4, 3), (randn(X), (randn(1, 2, 3),))),
    "h_0 and c_0 are not both tensors": lambda: (
        FusedLSTM(4, 3),
        (randn(X), (randn(1, 2, 3), None)),
    ),
    "h_0 and c_0 are not both of 2 dimensions, as the input is": lambda: (
        FusedLSTM(4, 3),
        (randn(5, 4), states(1, 1, 3)),
    ),
    "h_0 is (1, 2, 3), where (L*D, B, P) is (1, 2, 2)": lambda: (
        FusedLSTM(4, 3, proj_size=2),
        (randn(X), states(1, 2, 3)),
    ),
    "c_0 is (1, 2, 4), where (L*D, B, H) is (1, 2, 3)": lambda: (
        FusedLSTM(4, 3),
        (randn(X), (randn(1, 2, 3), randn(1, 2, 4))),
    ),
    "the input is on cpu, a state or weight on meta": lambda: (
        FusedLSTM(4, 3, device="meta"),
        (randn(X),),
    ),
    "a tensor's layout is torch.sparse_coo": lambda: (FusedLSTM(4, 3), (randn(X).to_sparse(),)),
    "the input is torch.float64, a state or weight torch.float32": lambda: (
        FusedLSTM(4, 3),
        (randn(X).double(),),
    ),
    "the input is torch.float32, a state or weight torch.float16": lambda: (
        FusedLSTM(4, 3),
        (randn(X), (randn(1, 2, 3), randn(1, 2, 3).half())),
    ),
    "there is no LSTM in torch.float8_e4m3fn": lambda: (
        FusedLSTM(4, 3).to(torch.float8_e4m3fn),
        (randn(X).to(torch.float8_e4m3fn),),
    ),
    "it refuses these dtypes under autocast": lambda: (
        FusedLSTM(4, 3),
        (torch.ones(X, dtype=torch.int64),),
    ),
}


class Reached(Exception):
    """nn.LSTM's own code."""


@pytest.mark.parametrize("reason", STOCK)
def test_torchs_own_code(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lstm, arguments = STOCK[reason]()

    def reached(*_: Any) -> None:
        raise Reached

    monkeypatch.setattr(nn.LSTM, "forward", reached)
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in reason):
        found = explain(lstm, *arguments)
        with pytest.raises(Reached):
            lstm(*arguments)
    assert (found.backend, found.reason, found.table) == ("torch.nn.LSTM", reason, ())
    assert str(found).splitlines()[0] == f"torch.nn.LSTM's own code answers: {reason}"


def test_every_reason_is_tested() -> None:
    raised = set()
    for reason, make in STOCK.items():
        lstm, arguments = make()
        data = arguments[0]
        rows = (data.data, data.batch_sizes) if isinstance(data, tuple) else (data, None)
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in reason):
            with pytest.raises(Refusal) as error:
                lstm._prepare(*rows, *arguments[1:] or [None])
        raised.add((error.traceback[-1].path.name, error.traceback[-1].lineno + 1))
    written = {
        (f"{of.__name__.rpartition('.')[2]}.py", node.lineno)
        for of in (functional, module)
        for node in ast.walk(ast.parse(inspect.getsource(of)))
        if isinstance(node, ast.Raise) and "Refusal(" in ast.unparse(node)
    }
    assert raised == written


# --- errors ---------------------------------------------------------------------------------------


def test_a_weight_of_another_shape() -> None:
    lstm = assigned(FusedLSTM(4, 3), bias_hh_l0=nn.Parameter(randn(7)))
    found = explain(lstm, randn(X))
    assert found.backend is None and not found.table
    with pytest.raises(RuntimeError) as error:
        lstm(randn(X))
    assert found.reason == str(error.value)
    assert str(found).splitlines()[0] == f"RuntimeError: {error.value}"


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_forced_one_that_can_not(name: str) -> None:
    lstm, x = FusedLSTM(4, 3, dtype=torch.complex64), randn(X, dtype=torch.complex64)
    with backend(name):
        found = explain(lstm, x)
        with pytest.raises(RuntimeError) as error:
            lstm(x)
    assert (found.backend, found.reason, found.forced) == (None, str(error.value), name)
    assert found.reason.endswith(found[name].detail)
    assert found["reference"].detail == f"'{name}' is forced"
    assert not any(line.available for line in found.table)
    assert f"forced: {name}" in str(found)


def test_another_module() -> None:
    with pytest.raises(TypeError, match="takes a FusedLSTM, and this is of type LSTM"):
        explain(nn.LSTM(4, 3), randn(X))


# --- what serves ----------------------------------------------------------------------------------


def serves(name: str, lstm: FusedLSTM, x: Any, hx: Any = None) -> Any:
    """What is said of a call, which is held to what the call does."""
    found = explain(lstm, x, hx)
    assert found.backend == name
    assert [line.name for line in found.table if line.available] == [name]
    namespace = {"reference": "", "triton": "fused_lstm_triton"}.get(name, "fused_lstm")
    with Served() as served:
        lstm(x, hx)
    assert served.namespace == namespace
    return found


def test_cpu() -> None:
    lstm, x = FusedLSTM(4, 3, 2, bidirectional=True), randn(X)
    found = serves("cpu", lstm, x)
    assert found.reason == found["cpu"].detail == "the first that can"
    assert found["cuda"].detail and found["triton"].detail
    assert found["reference"].detail == "'cpu' comes first"
    assert found.sizes == "T 5, B 2, I 4, H 3, layers 2, directions 2"
    assert found.threads == f"at most {backends().threads}"
    assert found.forward == f"kernels of {_C.cpu_isa()}"
    assert found.backward == f"kernels of {_C.cpu_isa()}"
    assert (found.dtype, found.results) == (torch.float32, (torch.float32,) * 3)
    assert found.forced is None and found.transform is None
    lines = str(found).splitlines()
    assert lines[:2] == ["backend    serves", "cpu        yes        the first that can"]
    assert "results      output float32, h_n float32, c_n float32" in lines
    assert f"threads      {found.threads}" in lines and "transform    none" in lines


def test_layouts() -> None:
    rows = [randn(n, 4) for n in (3, 5, 1)]
    packed = pack_sequence(rows, enforce_sorted=False)
    given = states(1, 3, 3)
    assert explain(FusedLSTM(4, 3), packed, given).sizes == (
        "T 5, B 3, I 4, H 3, layers 1, directions 1, packed rows 9"
    )
    of = FusedLSTM(4, 3, batch_first=True, proj_size=2)
    assert explain(of, randn(X)).sizes == "T 2, B 5, I 4, H 3, P 2, layers 1, directions 1"
    assert explain(of, randn(5, 4), (randn(1, 2), randn(1, 3))).sizes.startswith("T 5, B 1,")
    assert explain(of, randn(0, 2, 4)).forward == "nothing runs: there are no sequences"


def test_without_a_backward() -> None:
    lstm, x = FusedLSTM(4, 3), randn(X)
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            found = serves("cpu", lstm, x)
            assert found.backward == "none: gradients are off"
            assert found.forward == f"kernels of {_C.cpu_isa()}"
    lstm.requires_grad_(False)
    assert explain(lstm, x).backward == "none: nothing here requires a gradient"
    given = tuple(state.requires_grad_() for state in states(1, 2, 3))
    assert explain(lstm, x, given).backward == f"kernels of {_C.cpu_isa()}"


def test_dtypes_of_the_reference() -> None:
    found = serves(
        "reference", FusedLSTM(4, 3, dtype=torch.complex64), randn(X).to(torch.complex64)
    )
    assert found["cpu"].detail == "it does not serve torch.complex64"
    assert found.forward == "torch's operators, step by step"
    assert found.backward == "torch's, operator by operator"
    assert not found.threads and "threads" not in str(found)


def test_forced() -> None:
    lstm, x = FusedLSTM(4, 3), randn(X)
    with backend("reference"):
        found = serves("reference", lstm, x)
        assert found.reason == "forced" and found.forced == "reference"
        assert found["cpu"].detail == "'reference' is forced"
        assert "\nforced: reference\n" in str(found)
        with backend("cpu"):
            assert serves("cpu", lstm, x).reason == "forced"


def test_transforms() -> None:
    lstm, x = FusedLSTM(4, 3), randn(X)
    told: list[Any] = []

    def loss(x: Tensor) -> Tensor:
        told.append(explain(lstm, x))
        return x.sum()

    torch.func.grad(loss)(x)
    torch.func.vmap(loss)(x.expand(2, *X))
    torch.func.jvp(loss, (x,), (x,))
    with forward_ad.dual_level():
        loss(forward_ad.make_dual(x, x))
    assert [found.transform for found in told] == ["torch.func"] * 3 + ["forward-mode AD"]
    for found in told:
        assert found.backend == "reference"
        assert found["cpu"].detail == (
            "torch.func transforms and forward-mode AD need the backend 'reference'"
        )
        assert found.backward == "torch's, operator by operator, as the transform asks for it"
    assert "\ntransform    torch.func\n" in str(told[0])


@pytest.mark.parametrize("onednn", [True, False], ids=["oneDNN", "composed"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast(weights: torch.dtype, cast: torch.dtype, onednn: bool) -> None:
    """Without oneDNN, nn.LSTM's results differ from each other in dtype."""
    lstm, x = FusedLSTM(4, 3, dtype=weights), randn(X).to(weights)
    with torch.autocast("cpu", cast), torch.backends.mkldnn.flags(enabled=onednn):
        found = serves("cpu", lstm, x)
        output, (h_n, c_n) = lstm(x)
    assert found.dtype is (torch.float64 if weights is torch.float64 else cast)
    assert found.results == (output.dtype, h_n.dtype, c_n.dtype)


def test_meta() -> None:
    found = serves("cpu", FusedLSTM(4, 3, device="meta"), torch.empty(X, device="meta"))
    assert found.forward == "nothing runs: tensors on meta are shapes only"


# --- GPUs that need not be there ------------------------------------------------------------------


def of_gpu(kind: str) -> Any:
    with FakeTensorMode():
        lstm = FusedLSTM(4, 3, device="meta")
        for name, weight in lstm.named_parameters():  # whose initialisation needs a GPU
            setattr(lstm, name, nn.Parameter(torch.empty(weight.shape, device=kind)))
        return explain(lstm, torch.empty(X, device=kind))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "BUILT", True)
    monkeypatch.setattr(triton, "installed", lambda: (True, "made up"))
    found = of_gpu("cuda")
    assert found.backend == "cuda"
    assert found["cpu"].detail == "it serves tensors on the CPU, and this one is on cuda:0"
    assert found["triton"].detail == "'cuda' comes first"
    assert found.backward == "nothing runs: no GPU is visible"
    assert of_gpu("xpu").backend == "triton"
    monkeypatch.setattr(cuda, "BUILT", False)
    monkeypatch.setattr(cuda, "FACTS", "not built")
    found = of_gpu("cuda")
    assert found.backend == "triton" and found["cuda"].detail == "not built"
    monkeypatch.setattr(triton, "installed", lambda: (False, "not installed"))
    found = of_gpu("cuda")
    assert found.backend == "reference" and found["triton"].detail == "not installed"
    assert found.threads == ""


def test_plans_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        _C, "cuda_plan", lambda *given: asked.append(given) or "made up", raising=False
    )
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def told(dtype: torch.dtype, pass_: str = "backward", **options: Any) -> str:
        lstm = FusedLSTM(4, 3, dtype=dtype, **options)
        return inside._cuda_plan(pass_, lstm._prepare(randn(X).to(dtype), None, None))

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert told(dtype, num_layers=2, bidirectional=True) == "made up"
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "tf32", lambda: True)
        told(torch.bfloat16), told(torch.float32)
    names = ["float32", "bfloat16", "float16"]
    assert asked[:3] == [("backward", name, 5, 2, 3, 2) for name in names]
    assert asked[3:] == [("backward", name, 5, 2, 3, 1) for name in ("bfloat16", "tf32")]
    assert told(torch.float64) == "a product and a fused cell for each step: float64"
    assert told(torch.float32, proj_size=2) == "a product and a fused cell for each step: proj_size"
    assert len(asked) == 5

    monkeypatch.setattr(_C, "cuda_single", lambda *of: asked.append(of) or True, raising=False)
    assert told(torch.float64, "forward") == "one launch: both products and the cell"
    assert asked[5] == (5, 2, 4 * 3 * (4 + 3) * 8)
    assert told(torch.float32, "forward", proj_size=2).endswith(": proj_size")


def test_plans_of_triton_in_words() -> None:
    h200 = Device(132, 227 << 10, True)
    kinds = {
        describe(plan(False, H, 16, 1, H == 3, torch.float16, False, h200)).partition(":")[0]
        for H in (3, 64, 512, 4096)
    }
    assert kinds == {"steps", "whole", "split", "streamed"}
    words = describe(plan(False, 64, 16, 1, False, torch.float16, False, h200))
    assert "tiles of 16 sequences and 64 units" in words


@pytest.mark.gpu
@pytest.mark.skipif(not backends()["cuda"].available, reason=backends()["cuda"].detail)
def test_on_a_gpu() -> None:
    found = serves("cuda", FusedLSTM(64, 96, device="cuda"), randn(48, 16, 64, device="cuda"))
    assert found.forward.startswith("persistent: ") and found.backward.startswith("persistent: ")


# --- nothing happens ------------------------------------------------------------------------------

VIEWS = {"aten.unsqueeze", "aten.transpose", "aten.alias"}


class Computed(TorchDispatchMode):
    """The operators that ran, but those that give the same memory another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).rpartition(".")[0] not in VIEWS:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_is_computed() -> None:
    lstm = FusedLSTM(4, 3, 2, batch_first=True, dropout=0.5)
    rows = pack_sequence([randn(n, 4) for n in (3, 5, 1)], enforce_sorted=False)
    calls = [(randn(X),), (randn(5, 4), states(2, 3)), (rows, states(2, 3, 3)), (randn(5, 2, 7),)]
    before = torch.get_rng_state()
    for cast in (False, True):
        with Computed() as computed, torch.autocast("cpu", torch.bfloat16, enabled=cast):
            for arguments in calls:
                str(explain(lstm, *arguments))
        assert not computed.names
    assert torch.equal(torch.get_rng_state(), before)
