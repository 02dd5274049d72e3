"""Which backend serves a call, what forces another, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fresh_process import run_python
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_lstm import _C, FusedLSTM, backend, backends, cuda, triton
from fused_lstm.backends import choose

X = torch.ones(3, 2, 4)


class Served(torch.utils._python_dispatch.TorchDispatchMode):
    """Whether this package's operators ran, and whose."""

    namespace = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("fused_lstm"):
            self.namespace = func.namespace
        return func(*args, **(kwargs or {}))


def by_kernels(lstm: FusedLSTM, x: torch.Tensor = X, namespace: str = "fused_lstm") -> bool:
    with Served() as served:
        lstm(x)
    assert served.namespace in ("", namespace)
    return served.namespace == namespace


def test_automatic_choice() -> None:
    assert by_kernels(FusedLSTM(4, 3))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert by_kernels(FusedLSTM(4, 3, dtype=dtype), X.to(dtype))
    assert not by_kernels(FusedLSTM(4, 3, dtype=torch.complex64), X.to(torch.complex64))


@pytest.mark.gpu
@pytest.mark.skipif(not backends()["cuda"].available, reason=backends()["cuda"].detail)
def test_automatic_choice_on_a_gpu() -> None:
    lstm, x = FusedLSTM(4, 3, device="cuda"), X.cuda()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert by_kernels(lstm.to(dtype), x.to(dtype))
    with backend("reference"):
        assert not by_kernels(lstm.float(), x)
    assert not by_kernels(lstm.to(torch.complex64), x.to(torch.complex64))


@pytest.mark.gpu
@pytest.mark.skipif(not backends()["triton"].available, reason=backends()["triton"].detail)
def test_automatic_choice_on_a_gpu_without_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "BUILT", False)
    lstm, x = FusedLSTM(4, 3, device="cuda"), X.cuda()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert by_kernels(lstm.to(dtype), x.to(dtype), "fused_lstm_triton")


def test_automatic_choice_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tensors of GPUs that need not be there."""
    built = cuda.BUILT

    def chosen(x: torch.Tensor, transform: str | None = None) -> str:
        return choose(x, x.dtype, transform)

    with FakeTensorMode():
        of_cuda, of_xpu = (torch.empty(3, 2, 4, device=device) for device in ("cuda", "xpu"))
        assert chosen(X) == chosen(torch.empty(3, 2, 4, device="meta")) == "cpu"
        monkeypatch.setattr(triton, "installed", lambda: (False, "made up"))
        without = chosen(of_cuda), chosen(of_xpu)
        monkeypatch.setattr(triton, "installed", lambda: (True, "made up"))
        beside = chosen(of_cuda), chosen(of_xpu)
        monkeypatch.setattr(cuda, "BUILT", False)
        alone = chosen(of_cuda), chosen(of_cuda, "torch.func")
    assert without == ("cuda" if built else "reference", "reference")
    assert beside == ("cuda" if built else "triton", "triton")
    assert alone == ("triton", "reference")


def test_forced() -> None:
    lstm = FusedLSTM(4, 3)
    with backend("reference"):
        assert not by_kernels(lstm)
        assert backends().forced == "reference"
        with backend("cpu"):
            assert by_kernels(lstm)
        assert not by_kernels(lstm)
    assert by_kernels(lstm) and backends().forced is None
    with pytest.raises(ZeroDivisionError), backend("reference"):
        1 / 0  # noqa: B018
    assert by_kernels(lstm)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_forced_one_that_is_not_there(name: str) -> None:
    line = backends()[name]
    if line.available:
        pytest.skip(f"{name} is there")
    lstm = FusedLSTM(4, 3)
    with backend(name), pytest.raises(RuntimeError) as error:
        lstm(X)
    assert line.detail
    assert str(error.value) == f"the forced backend '{name}' can't serve this call: {line.detail}"


def test_forced_one_that_can_not() -> None:
    lstm = FusedLSTM(4, 3, dtype=torch.complex64)
    with backend("cpu"), pytest.raises(RuntimeError, match="does not serve torch.complex64"):
        lstm(X.to(torch.complex64))


def test_what_triton_can_not(monkeypatch: pytest.MonkeyPatch) -> None:
    lstm = FusedLSTM(4, 3)
    monkeypatch.setattr(triton, "installed", lambda: (True, "Triton 3.6.0"))
    monkeypatch.setattr(triton, "absence", lambda: None)
    with backend("triton"), pytest.raises(RuntimeError) as error:
        lstm(X)
    assert str(error.value) == (
        "the forced backend 'triton' can't serve this call: "
        "it serves tensors on GPUs, and this one is on cpu"
    )
    with backend("triton"):  # which need only the shapes
        assert lstm.to("meta")(X.to("meta"))[0].shape == (3, 2, 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 77)
    for capability, usable in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index, c=capability: c)
        triton.device_refusal.forget()
        line = triton.available()
        assert line[0] == usable
        assert "Tesla T4" in line[1] and ("has 7.5" in line[1]) == (not usable)
    triton.device_refusal.forget()


def test_unknown_name() -> None:
    with pytest.raises(ValueError) as error:
        backend("gpu")
    assert str(error.value) == (
        "unknown backend 'gpu', expected one of: cpu, cuda, triton, reference"
    )
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        backends()["gpu"]


def test_table() -> None:
    table = backends()
    assert [line.name for line in table] == ["cpu", "cuda", "triton", "reference"]
    assert table["cpu"].available and table["reference"].available
    usable, version = triton.installed()
    if not usable:
        assert table["triton"].detail == version and not table["triton"].available
    elif not torch.cuda.is_available() and not torch.xpu.is_available():
        assert table["triton"].detail == f"{version}: no GPU visible"
        assert not table["triton"].available
    else:
        assert table["triton"].detail.startswith(("Triton 3", "Triton supports"))
    built = table.build["cuda"]
    if not built.startswith("yes: "):
        assert built == f"no: {table['cuda'].detail}" and not table["cuda"].available
    elif not torch.cuda.is_available():
        assert table["cuda"].detail == f"built for {built[5:]}, no GPU visible"
        assert not table["cuda"].available
    else:
        assert torch.cuda.get_device_name() in table["cuda"].detail
    text = str(table)
    assert table.build["torch"] in text and "compiler" in text
    for name, supported in _C.cpu_isas():
        (line,) = (line for line in text.splitlines() if line.startswith(f"{name} "))
        if name == _C.cpu_isa():
            assert line.endswith("in use")
        else:
            assert ("no: this processor" in line) == (not supported)


@pytest.mark.skipif(not hasattr(_C, "cuda_plan"), reason=_C.build_info()["cuda"])
def test_plans() -> None:
    """In words, of a GPU that need not be there: an H200, and one too old."""
    h200, old = (132, 227 << 10, 9, 0), (80, 96 << 10, 7, 0)
    for pass_ in ("forward", "backward"):
        for operands in ("bfloat16", "float16", "tf32", "float32"):
            plan = _C.cuda_plan(pass_, operands, 1024, 16, 256, device=h200)
            assert plan.startswith("persistent: "), plan
            plan = _C.cuda_plan(pass_, operands, 1024, 16, 256, 2, old)
            assert "compute capability" in plan and not plan.startswith("persistent")
    with pytest.raises(ValueError, match="'int8' is none of: bfloat16 float16 tf32 float32"):
        _C.cuda_plan("forward", "int8", 1024, 16, 256, device=h200)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="GPU"):
            _C.cuda_plan("forward", "float32", 1024, 16, 256)


def test_command() -> None:
    found = run_python("-m", "fused_lstm", FUSED_LSTM_BACKEND="")
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"{backends()}\n"


def test_environment_variable() -> None:
    code = "import fused_lstm; print(fused_lstm.backends().forced)"
    assert run_python("-c", code, FUSED_LSTM_BACKEND="reference").stdout == "reference\n"
    found = run_python("-c", code, FUSED_LSTM_BACKEND="gpu")
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == (
        "ValueError: unknown backend 'gpu', expected one of: cpu, cuda, triton, reference"
    )


def test_other_torch_than_built_against() -> None:
    found = run_python("-c", "import torch; torch.__version__ = '2.99.0'; import fused_lstm")
    assert found.returncode == 1
    built = _C.build_info()["torch"]
    assert found.stderr.splitlines()[-1] == (
        f"ImportError: fused_lstm was built against torch {built} and can't run with torch 2.99.0; "
        "run `pip install --force-reinstall --no-deps .` in its source folder "
        f"(tested with torch {_C.build_info()['tested'].replace(' ', ', ')})"
    )


def test_compiled_part_that_does_not_load() -> None:
    code = "import sys; sys.modules['fused_lstm._C'] = None; import fused_lstm"
    found = run_python("-c", code)
    assert found.returncode == 1
    last = found.stderr.splitlines()[-1]
    assert last.startswith("ImportError: fused_lstm's compiled part does not load beside torch")
    assert torch.__version__ in last and "pip install --force-reinstall" in last
