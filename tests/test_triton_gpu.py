"""The Triton kernels on a real GPU: the interpreter's cases, FusedLSTM, and what only a GPU shows.

Few sizes, for each is compiled first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_gpu_contract as contract
import torch
from gpu import PRECISIONS, check_on_gpu, tf32
from parity import Options

from fused_lstm import FusedLSTM, backend, backends
from fused_lstm.triton import installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not backends()["triton"].available, reason=backends()["triton"].detail),
]

if installed()[0]:
    from triton_kernels import CASES, check, check_activations, found_by_triton, name
    from triton_kernels import use as use
else:
    CASES, name = [], str


@pytest.fixture(autouse=True)
def no_tf32():
    with tf32(False):
        yield


@pytest.mark.parametrize("case", CASES, ids=name)
def test_parity(case, use) -> None:
    chosen, dtype, options = case
    use(chosen)
    check(options, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["3-D", "packed"])
@pytest.mark.parametrize("H", [64, 129, 256, 1024, 2048])
def test_as_the_table_has_it(H: int, kind: str, dtype: torch.dtype) -> None:
    check(Options(I=33, H=H, T=17, B=33, bidirectional=True, kind=kind), dtype, "cuda")


@pytest.mark.parametrize("H", [64, 768])
def test_same_bits(H: int) -> None:
    """Many steps, many runs: a lost release or acquire shows as another number."""
    from parity import arguments

    options = Options(I=16, H=H, T=300, B=16)
    stock = options.lstm().to("cuda", torch.bfloat16)
    args = arguments(options, torch.bfloat16, "cuda")
    first = found_by_triton(stock, args)
    for _ in range(10):
        for key, of in found_by_triton(stock, args).items():
            assert torch.equal(of, first[key]), key


def test_activations() -> None:
    check_activations("cuda")


# --- by FusedLSTM ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "options",
    [
        Options(I=17, H=33, T=9, B=5, num_layers=2, bidirectional=True, batch_first=True),
        Options(I=33, H=257, T=9, B=17, bidirectional=True, kind="unsorted", bias=False),
        Options(I=17, H=65, T=9, B=5, num_layers=2, proj_size=33, given_hx=False),
    ],
    ids=["whole", "split", "projected"],
)
def test_module(options: Options, precision: str) -> None:
    check_on_gpu(options, precision, "triton")


@pytest.mark.parametrize(
    "test, arguments",
    [
        *((contract.test_captured_in_a_graph, (name, torch.bfloat16))
          for name in ("few units", "one team", "projected", "two steps")),
        *((contract.test_same_bits_again, (name, torch.bfloat16))
          for name in ("few units", "one team", "packed")),
        *((test, (name,))
          for test in (contract.test_on_a_stream_of_its_own,
                       contract.test_waits_for_what_its_stream_still_does)
          for name in ("few units", "one team", "packed")),
        (contract.test_backward_in_eval_mode, (torch.bfloat16,)),
        (contract.test_backward_again, (torch.bfloat16,)),
        (contract.test_compiled, ("one team", "aot_eager")),
        (contract.test_compiled, ("packed", "inductor")),
        (contract.test_autocast, ("one team", torch.bfloat16)),
    ],
    ids=lambda of: of.__name__[5:] if callable(of) else str(of[0]),
)  # fmt: skip
def test_contract(test: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What test_gpu_contract.py asks of the CUDA kernels, but packed calls in a graph."""
    with backend("triton"):
        test(*arguments)


def test_beside_one_that_holds_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    with backend("triton"):
        contract.test_beside_one_that_holds_multiprocessors(torch.bfloat16, 16, monkeypatch)


def test_forcing() -> None:
    """The backward is of the backend that ran the forward."""
    lstm = FusedLSTM(4, 5, device="cuda")
    x = torch.randn(3, 2, 4, device="cuda", requires_grad=True)
    with backend("triton"):
        output, _ = lstm(x)
        with pytest.raises(RuntimeError, match="serves tensors on GPUs, and this one is on cpu"):
            FusedLSTM(4, 5)(x.cpu())
    (grad,) = torch.autograd.grad(output.sum(), x)
    with backend("reference"):
        torch.testing.assert_close(grad, torch.autograd.grad(lstm(x)[0].sum(), x)[0])


@pytest.mark.parametrize("options", [Options(), Options(kind="packed", bidirectional=True)])
def test_checked_by_torch(options: Options) -> None:
    """Schema, fakes and autograd registration against what the operators do."""
    pytest.importorskip("expecttest", reason="torch's opcheck needs it")
    args = contract.prepared(options, torch.float32)[1]
    weights = [of.cuda() for of in options.lstm().parameters()]
    sizes = None if args.layout is None else args.layout.batch_sizes
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    inputs = (args.input, sizes, *args.hx, weights)
    torch.library.opcheck(torch.ops.fused_lstm_triton.lstm_forward, inputs, test_utils=tests)
