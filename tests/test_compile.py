"""torch.compile without graph breaks, torch.export, and what torch.library checks of operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from parity import DTYPES, Options, arguments
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.flop_counter import FlopCounterMode

from fused_lstm import FusedLSTM, backend


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """By TorchDynamo and AOTAutograd, then run as it is: no compiler is needed for that."""
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


def gradients(module: nn.Module, run: Callable[..., Any], *args: Any) -> list[Tensor]:
    module.zero_grad()
    output, (h_n, c_n) = run(*args)
    (output.square().sum() + h_n.sum() * c_n.square().sum()).backward()
    return [output, h_n, c_n, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(num_layers=2, bidirectional=True, batch_first=True, given_hx=False),
        Options(kind="2-D", proj_size=3, bias=False),
    ],
    ids=["plain", "stacked", "unbatched"],
)
def test_training(options: Options, dtype: torch.dtype) -> None:
    """The same bits as without compiling, forward and backward."""
    lstm = FusedLSTM.from_torch(options.lstm().to(dtype))
    args = arguments(options, dtype)
    expected = gradients(lstm, lstm, args.input, args.hx)
    found = gradients(lstm, compiled(lstm), args.input, args.hx)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_inference() -> None:
    lstm = FusedLSTM(3, 4, 2)
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(compiled(lstm)(x), lstm(x), rtol=0, atol=0)


def test_dropout() -> None:
    lstm = FusedLSTM(3, 4, 2, dropout=0.5)
    x = torch.randn(5, 2, 3)
    run = compiled(lstm)
    assert not torch.equal(run(x)[0], run(x)[0])
    lstm.eval()
    assert torch.equal(run(x)[0], lstm(x)[0])


@pytest.mark.parametrize("how", ["dynamic", "marked", "automatic"])
def test_one_compilation_serves_every_length(how: str) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    lstm = FusedLSTM(3, 4, 2, bidirectional=True)
    run = torch.compile(
        lstm, backend=counter, fullgraph=True, dynamic=True if how == "dynamic" else None
    )
    counts = []
    for T in (5, 7, 2, 100, 31):
        x = torch.randn(T, 2, 3)
        if how == "marked":
            torch._dynamo.mark_dynamic(x, 0)
        found = gradients(lstm, run, x)
        torch.testing.assert_close(found, gradients(lstm, lstm, x), rtol=0, atol=0)
        counts.append(counter.frame_count)
    # Unasked, TorchDynamo takes the first T for a constant, and the second for a variable.
    assert len(set(counts[1 if how == "automatic" else 0 :])) == 1, counts


def test_inside_a_model_with_carried_states() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 3)
            self.lstm = FusedLSTM(3, 4, batch_first=True)
            self.head = nn.Linear(4, 11)

        def forward(self, ids: Tensor, hx: Any) -> Any:
            output, hx = self.lstm(self.embedding(ids), hx)
            output, hx = self.lstm(output[..., :3].tanh(), hx)
            return self.head(output), hx

    model = Model()
    ids = torch.randint(11, (2, 5))
    hx = (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    expected = gradients(model, model, ids, hx)
    torch.testing.assert_close(gradients(model, compiled(model), ids, hx), expected)


@pytest.mark.parametrize("given_hx", [True, False])
def test_packed(given_hx: bool) -> None:
    lstm = FusedLSTM(3, 4, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 5, 1)], enforce_sorted=False)
    hx = (torch.randn(2, 3, 4), torch.randn(2, 3, 4)) if given_hx else None

    def run(data: Tensor) -> Any:
        output, states = lstm(PackedSequence(data, *packed[1:]), hx)
        return output.data, states

    expected = gradients(lstm, run, packed.data)
    torch.testing.assert_close(gradients(lstm, compiled(run), packed.data), expected)
    found, states = compiled(lstm)(packed, hx)
    torch.testing.assert_close((found.data, states), run(packed.data))


def test_autocast() -> None:
    lstm = FusedLSTM(3, 17)
    x = torch.randn(5, 2, 3)

    def run(x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return lstm(x)

    torch.testing.assert_close(compiled(run)(x), run(x), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(lstm)(x), lstm(x), rtol=0, atol=0)


def test_transforms_inside() -> None:
    """Where the operator's own autograd would fail, or give a tangent of zeros."""
    lstm = FusedLSTM(2, 3).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    functions = {
        "grad": lambda x: torch.func.grad(lambda x: lstm(x)[0].sum())(x),
        "jvp": lambda x: torch.func.jvp(lambda x: lstm(x)[0], (x,), (x.cos(),))[1],
        "vmap": lambda x: torch.func.vmap(lambda x: lstm(x)[0], 1)(x),
    }
    for function in functions.values():
        torch.testing.assert_close(compiled(function)(x), function(x))
        torch._dynamo.reset()
    # The other way round, and the kernels again afterwards.
    run = torch.compile(lstm, backend="aot_eager")
    found, expected = (torch.func.grad(lambda x, f=f: f(x)[0].sum())(x) for f in (run, lstm))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(run(x), lstm(x), rtol=0, atol=0)


def test_forced_backend_is_guarded_on() -> None:
    lstm = FusedLSTM(3, 4)
    x = torch.randn(5, 2, 3)
    run = compiled(lstm)
    with torch.no_grad():
        run(x)
        with backend("reference"):
            expected = lstm(x)
            torch.testing.assert_close(run(x), expected, rtol=0, atol=0)
        with backend("cuda"), pytest.raises(Exception, match="forced backend 'cuda' can't serve"):
            run(x)
        torch.testing.assert_close(run(x), lstm(x), rtol=0, atol=0)


def test_inductor() -> None:
    lstm = FusedLSTM(3, 4, 2)
    x = torch.randn(5, 2, 3)
    expected = gradients(lstm, lstm, x)
    found = gradients(lstm, torch.compile(lstm, fullgraph=True), x)
    torch.testing.assert_close(found, expected)


def test_export() -> None:
    lstm = FusedLSTM(3, 4, 2, bidirectional=True, batch_first=True).eval()
    T = torch.export.Dim("T", min=1, max=1000)
    program = torch.export.export(lstm, (torch.randn(2, 5, 3),), dynamic_shapes=({1: T},))
    x = torch.randn(2, 9, 3)
    torch.testing.assert_close(program.module()(x), lstm(x))


def test_jit() -> None:
    """Tracing records the operator; scripting compiles nn.LSTM with the same weights."""
    lstm = FusedLSTM(3, 4)
    x = torch.randn(5, 2, 3)
    traced = torch.jit.trace(lstm, (x,))
    torch.testing.assert_close(traced(torch.ones(7, 1, 3)), lstm(torch.ones(7, 1, 3)))
    scripted = torch.jit.script(nn.Sequential(lstm))
    torch.testing.assert_close(scripted(x), lstm(x))


def test_meta_and_fake_tensors() -> None:
    lstm = FusedLSTM(3, 6, 2, bidirectional=True, proj_size=2, batch_first=True, device="meta")
    stock = nn.LSTM(3, 6, 2, bidirectional=True, proj_size=2, batch_first=True)
    output, (h_n, c_n) = lstm(torch.empty(2, 5, 3, device="meta"))
    for found, expected in zip((output, h_n, c_n), _flat(stock(torch.empty(2, 5, 3))), strict=True):
        assert found.is_meta and found.shape == expected.shape
        assert found.stride() == expected.stride()
    output.sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in lstm.parameters())


def _flat(result: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (result[0], *result[1])


def _operands(options: Options, dtype: torch.dtype, requires_grad: bool) -> tuple[Any, ...]:
    args = arguments(options, dtype)
    sizes = None if args.layout is None else args.layout.batch_sizes
    weights = [
        w.detach().requires_grad_(requires_grad) for w in options.lstm().to(dtype).parameters()
    ]
    states = [state.requires_grad_(requires_grad) for state in args.hx]
    return (args.input.requires_grad_(requires_grad), sizes, *states, weights)


OPERATOR_CASES = {
    "plain": Options(I=3, H=5, T=2, B=2),
    "both directions, projected": Options(I=3, H=5, T=2, B=2, bidirectional=True, proj_size=2),
    "packed, no bias": Options(I=3, H=5, T=3, B=3, kind="packed", bias=False),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", OPERATOR_CASES)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """Schemas, autograd registration, fakes (shapes, dtypes, strides) and AOT dispatch."""
    operands = _operands(OPERATOR_CASES[name], dtype, requires_grad=True)
    torch.library.opcheck(torch.ops.fused_lstm.lstm_forward.default, operands)
    plain = _operands(OPERATOR_CASES[name], dtype, requires_grad=False)
    torch.library.opcheck(torch.ops.fused_lstm.lstm_inference.default, plain)
    stack = replace(OPERATOR_CASES[name], num_layers=3)
    operands = (*_operands(stack, dtype, requires_grad=False), 3)
    torch.library.opcheck(torch.ops.fused_lstm.lstm_stack_inference.default, operands)
    results = torch.ops.fused_lstm.lstm_forward(*plain)
    grads = [torch.randn_like(result) for result in results[:3]]
    saved = (results[0], *results[3:])
    everything = [True] * (3 + len(plain[4]))
    some = [index % 2 == 0 for index in range(len(everything))]
    for given, needs in ((grads, everything), ((None, grads[1], None), some)):
        torch.library.opcheck(
            torch.ops.fused_lstm.lstm_backward.default, (*given, *plain, *saved, needs)
        )
        torch.library.opcheck(  # never compiled: AOTAutograd takes no mutable operator with a list
            torch.ops.fused_lstm.lstm_backward_consuming.default,
            (*given, *plain, *saved, needs),
            test_utils=["test_schema", "test_autograd_registration", "test_faketensor"],
        )


def test_opcheck_of_double_backward() -> None:
    operands = _operands(OPERATOR_CASES["plain"], torch.float64, requires_grad=True)
    output, h_n, c_n, *saved = torch.ops.fused_lstm.lstm_forward(*operands)
    grads = [torch.randn_like(result) for result in (output, h_n, c_n)]
    needs = [True] * (3 + len(operands[4]))
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):
        # torch 2.11's AOTAutograd does not trace the torch.func.vjp inside the formula
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.fused_lstm.lstm_backward.default,
        (*grads, *operands, output.detach(), *saved, needs),
        test_utils=checks,
    )


def test_flops() -> None:
    """Two for each multiply-add of the products: T * B rows, 4H x I and 4H x P, and P x H."""
    T, B, I, H, P = 5, 2, 3, 7, 4  # noqa: E741
    lstm = FusedLSTM(I, H, bidirectional=True, proj_size=P)
    x = torch.randn(T, B, I)
    of_weights = 2 * 2 * T * B * (4 * H * I + 4 * H * P + P * H)
    with FlopCounterMode(display=False) as counter:
        output, _ = lstm(x)
    assert counter.get_total_flops() == of_weights
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lstm(x)
    assert counter.get_total_flops() == of_weights
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    # the weights' gradients, and the gradient through the recurrence but not to x
    assert counter.get_total_flops() == 2 * of_weights - 2 * 2 * T * B * 4 * H * I
    packed = pack_sequence([torch.randn(n, I) for n in (5, 3)])
    with FlopCounterMode(display=False) as counter:
        lstm(packed)
    assert counter.get_total_flops() == of_weights // (T * B) * 8
