"""FusedLSTM through the Triton operators, on the CPU: what torch is told of them, end to end.

Not collected by itself: test_triton.py runs it in a process of its own, for it has Triton interpret
its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import triton_interpreter  # noqa: F401  before the kernels

# isort: split
import pytest
import torch
import torch._dynamo.testing
from parity import Options, arguments, call, check
from test_compile import OPERATOR_CASES, _operands, gradients
from test_gradients import CASES, function
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fused_lstm.triton
from fused_lstm import FusedLSTM, backend, explain
from fused_lstm.ops import OPERATORS
from fused_lstm.triton import layer
from fused_lstm.triton.plan import describe, plan

OURS = OPERATORS["triton"]


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors pass for a GPU's, and every call is Triton's."""
    monkeypatch.setattr(fused_lstm.triton, "_DEVICES", ("cpu", "cuda", "xpu"))
    torch._dynamo.reset()
    with backend("triton"):
        yield
    torch._dynamo.reset()


class Calls(TorchDispatchMode):
    """The names of this package's operators, as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("fused_lstm"):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def names(*short: str) -> list[str]:
    return [f"fused_lstm_triton.lstm_{name}.default" for name in short]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        Options(num_layers=2, bidirectional=True, batch_first=True, given_hx=False),
        Options(kind="unsorted", bidirectional=True, bias=False),
        Options(kind="2-D", proj_size=3),
    ],
    ids=["stacked", "packed", "projected"],
)
def test_parity(options: Options, dtype: torch.dtype) -> None:
    with Calls() as calls:
        check(options, dtype)
    assert set(calls.names) == set(names("forward", "backward"))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 3}], ids=str)
@pytest.mark.parametrize("H", [33, 65])
@pytest.mark.parametrize("cast", [False, True], ids=["float32", "autocast"])
def test_explain(
    cast: bool, H: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells the plans that the call then makes."""
    chosen = []

    def recorded(*arguments: Any) -> Any:
        chosen.append(describe(plan(*arguments)))
        return plan(*arguments)

    lstm, x = FusedLSTM(4, H, **options), torch.randn(3, 2, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        told = explain(lstm, x)
        monkeypatch.setattr(layer, "plan", recorded)  # of the call only: explain asks it, too
        output, _ = lstm(x)
    output.sum().backward()
    assert told.backend == "triton" and told["triton"].detail == "forced"
    assert [told.forward, told.backward] == chosen


def test_backward_stays_with_the_forward() -> None:
    """Whichever backend is forced by then; and in eval mode, too."""
    lstm, x = FusedLSTM(3, 5).eval(), torch.randn(4, 2, 3, requires_grad=True)
    with Calls() as calls:
        output, _ = lstm(x)
        with backend("cpu"):
            (grad,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
            torch.autograd.grad(lstm(x)[0].sum(), x)
        with torch.no_grad():
            assert torch.equal(lstm(x)[0], output)
    others = ["fused_lstm.lstm_forward.default", "fused_lstm.lstm_backward.default"]
    assert calls.names == [*names("forward", "backward"), *others, *names("inference")]
    with backend("reference"):
        torch.testing.assert_close(grad, torch.autograd.grad(lstm(x)[0].sum(), x)[0])


def test_autocast() -> None:
    """Of the call; and a backward inside of it is computed in the dtype of its forward."""
    lstm, x = FusedLSTM(3, 5), torch.randn(4, 2, 3)
    expected = gradients(lstm, lstm, x)
    output, (h_n, c_n) = lstm(x)
    loss = output.square().sum() + h_n.sum() * c_n.square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(loss, list(lstm.parameters()))
        assert lstm(x)[0].dtype is torch.bfloat16
    assert all(map(torch.equal, grads, expected[3:]))


def test_kernels_run_below_autograd() -> None:
    x, state = torch.randn(4, 2, 3), torch.zeros(1, 2, 5)
    operands = (x, None, state, state, list(FusedLSTM(3, 5).parameters()))
    expected = OURS.lstm_forward(*operands)
    assert all(map(torch.equal, OURS.lstm_inference(*operands), expected[:3]))


@pytest.mark.parametrize("name", CASES)
def test_finite_differences(name: str) -> None:
    """Of first and second order; the second and the batched are the reference path's."""
    run, inputs = function(CASES[name])
    assert gradcheck(run, inputs, check_batched_grad=True)
    assert gradgradcheck(run, inputs)


def test_transforms() -> None:
    lstm, x = FusedLSTM(3, 5), torch.randn(4, 2, 3)
    with pytest.raises(RuntimeError, match="forced backend 'triton'.*need the backend 'reference'"):
        torch.func.grad(lambda x: lstm(x)[0].sum())(x)
    with pytest.raises(RuntimeError, match="forced backend 'triton'.*not serve torch.complex64"):
        lstm.to(torch.complex64)(x.to(torch.complex64))


# --- torch.compile and the operators' checks ------------------------------------------------------


def compiled(run: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(run, backend="aot_eager", fullgraph=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [Options(num_layers=2, bidirectional=True, given_hx=False), Options(proj_size=3, bias=False)],
    ids=["stacked", "projected"],
)
def test_compiled(options: Options, dtype: torch.dtype) -> None:
    """The same bits as without compiling, and the same operators."""
    lstm = FusedLSTM.from_torch(options.lstm().to(dtype))
    args = arguments(options, dtype)
    expected = gradients(lstm, lstm, args.input, args.hx)
    with Calls() as calls:
        found = gradients(lstm, lstm, args.input, args.hx)
    assert calls.names == names(
        *["forward"] * options.num_layers, *["backward"] * options.num_layers
    )
    found = gradients(lstm, compiled(lstm), args.input, args.hx)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with torch.no_grad():
        found = compiled(lstm)(args.input, args.hx)
        torch.testing.assert_close(found, lstm(args.input, args.hx), rtol=0, atol=0)


def test_compiled_packed_and_dynamic() -> None:
    lstm = FusedLSTM(3, 4, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 5, 1)], enforce_sorted=False)

    def run(data: Tensor) -> Any:
        output, states = lstm(PackedSequence(data, *packed[1:]))
        return output.data, states

    expected = gradients(lstm, run, packed.data)
    torch.testing.assert_close(gradients(lstm, compiled(run), packed.data), expected)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    dynamic = torch.compile(lstm, backend=counter, fullgraph=True, dynamic=True)
    for T in (5, 2, 7):
        x = torch.randn(T, 2, 3)
        found = gradients(lstm, dynamic, x)
        torch.testing.assert_close(found, gradients(lstm, lstm, x), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_forced_backend_is_guarded_on() -> None:
    lstm, x = FusedLSTM(3, 4), torch.randn(5, 2, 3)
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    run = torch.compile(lstm, backend=keep, fullgraph=True)
    with torch.no_grad():
        run(x)
        with backend("cpu"):
            run(x)
        run(x)
    inference = "fused_lstm{}.lstm_inference.default"
    assert [inference.format("_triton") in targets for targets in graphs] == [True, False]
    assert [inference.format("") in targets for targets in graphs] == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPERATOR_CASES)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    operands = _operands(OPERATOR_CASES[name], dtype, requires_grad=True)
    torch.library.opcheck(OURS.lstm_forward, operands)
    plain = _operands(OPERATOR_CASES[name], dtype, requires_grad=False)
    torch.library.opcheck(OURS.lstm_inference, plain)
    results = OURS.lstm_forward(*plain)
    grads = [torch.randn_like(result) for result in results[:3]]
    saved = (results[0], *results[3:])
    everything = [True] * (3 + len(plain[4]))
    some = [index % 2 == 0 for index in range(len(everything))]
    for given, needs in ((grads, everything), ((None, grads[1], None), some)):
        torch.library.opcheck(OURS.lstm_backward, (*given, *plain, *saved, needs))


def test_flops_and_meta() -> None:
    """As the CPU's operators have them."""
    counts = []
    for chosen in ("triton", "cpu"):
        with backend(chosen), FlopCounterMode(display=False) as counter:
            FusedLSTM(3, 5, bidirectional=True)(torch.randn(4, 2, 3))[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    options = Options(num_layers=2, bidirectional=True)
    lstm = FusedLSTM.from_torch(options.lstm())
    args = arguments(options, torch.float32)
    shapes = [result.shape for result in call(lstm, args)]
    found = call(lstm.to("meta"), args.to(torch.float32, "meta"))
    assert [result.shape for result in found] == shapes and found[0].is_meta
