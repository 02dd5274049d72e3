"""Outputs, states and every gradient on a GPU against float64, with cuDNN's LSTM as the yardstick.

The options and the rule of error are those of test_parity.py.
"""

from __future__ import annotations

import pytest
import torch
from gpu import DEVICE, PRECISIONS, check_on_gpu, kernels  # noqa: F401  the fixture
from parity import DTYPES, Options, arguments, call
from test_parity import _name, _product
from torch.autograd import gradcheck, gradgradcheck

from fused_lstm import _C, FusedLSTM, backend, backends

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

# On either side of what one block, one team, one launch of both directions, and one device hold.
HIDDEN = (64, 128, 200, 512, 768, 1024, 1500, 2048)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", _product(), ids=_name)
def test_options(options: Options, precision: str) -> None:
    check_on_gpu(options, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("H", HIDDEN)
@pytest.mark.parametrize(
    "options",
    [
        Options(I=64, T=9, B=16),
        Options(I=33, T=9, B=1, bias=False),
        Options(I=65, T=5, B=37, bidirectional=True, kind="unsorted"),
        Options(I=17, T=5, B=130, batch_first=True),
    ],
    ids=["batch", "one", "packed", "many"],
)
def test_hidden_sizes(options: Options, H: int, precision: str) -> None:
    check_on_gpu(Options(**{**vars(options), "H": H}), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "options",
    [
        Options(I=129, H=129, T=17, B=33),
        Options(I=33, H=129, T=33, B=1, bidirectional=True),
        Options(I=1, H=257, T=3, B=5, proj_size=129, num_layers=2),
        Options(I=65, H=33, T=65, B=17, kind="unsorted", num_layers=2, bidirectional=True),
        Options(I=17, H=65, T=1, B=129),
        Options(I=17, H=65, T=2, B=3000),
        Options(I=5, H=769, T=11, B=67, kind="packed", bidirectional=True),
    ],
    ids=_name,
)
def test_odd_sizes(options: Options, precision: str) -> None:
    check_on_gpu(options, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("H", [96, 768])
def test_long_sequence(H: int, precision: str) -> None:
    """Errors that grow with T, and waits that go wrong once in a thousand steps, show here."""
    check_on_gpu(Options(I=3, H=H, T=1000, B=16, num_layers=2), precision)


@pytest.mark.parametrize("kind", ["3-D", "unsorted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("H", [33, 768])
def test_same_without_gradients(H: int, dtype: torch.dtype, kind: str) -> None:
    """Inference gives the bits that training gives."""
    options = Options(num_layers=2, bidirectional=True, kind=kind, H=H)
    lstm = FusedLSTM.from_torch(options.lstm().to(DEVICE, dtype))
    args = arguments(options, dtype, DEVICE)
    training = call(lstm, args)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for found, expected in zip(call(lstm, args), training, strict=True):
                assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("how", ["sliced", "expanded", "strided", "reversed", "batch first"])
def test_strides_of_the_input(how: str, dtype: torch.dtype) -> None:
    """Inputs and states of any strides give the bits that contiguous ones give."""
    T, B, I, H = 5, 3, 17, 33  # noqa: E741
    lstm = FusedLSTM(I, H, num_layers=2, bidirectional=True, device=DEVICE, dtype=dtype)

    def make(*shape: int) -> torch.Tensor:
        def randn(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, device=DEVICE, dtype=dtype)

        if how == "sliced":
            return randn(shape[0] + 2, *shape[1:])[2:]
        if how == "expanded":
            return randn(1, 1, shape[2]).expand(shape)
        if how == "strided":
            return randn(*shape[:2], 2 * shape[2])[..., ::2]
        if how == "reversed":
            return randn(*shape[::-1]).permute(2, 1, 0)
        return randn(shape[1], shape[0], shape[2]).transpose(0, 1)

    inputs = [make(T, B, I), make(4, B, H), make(4, B, H)]
    plain = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
    both = []
    for x, h_0, c_0 in (inputs, plain):
        for tensor in (x, h_0, c_0):
            tensor.requires_grad_()
        output, (h_n, c_n) = lstm(x, (h_0, c_0))
        # a gradient of the output that is not dense, too
        grads = torch.autograd.grad(output.sum() + h_n.sum(), [x, h_0, c_0, *lstm.parameters()])
        both.append([output, h_n, c_n, *grads])
    for found, expected in zip(*both, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("batch_first", [False, True])
def test_strides_of_the_results(batch_first: bool) -> None:
    options = Options(batch_first=batch_first, bidirectional=True)
    stock = options.lstm().to(DEVICE)
    args = arguments(options, torch.float32, DEVICE)
    fused = FusedLSTM.from_torch(stock)
    for found, expected in zip(call(fused, args), call(stock, args), strict=True):
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_no_sequences(proj_size: int, dtype: torch.dtype) -> None:
    """B = 0 is a valid batch; its gradients are zeros."""
    lstm = FusedLSTM(3, 5, 2, bidirectional=True, proj_size=proj_size, device=DEVICE, dtype=dtype)
    x = torch.zeros(4, 0, 3, device=DEVICE, dtype=dtype, requires_grad=True)
    output, (h_n, c_n) = lstm(x)
    (output.sum() + h_n.sum() + c_n.sum()).backward()
    P = proj_size or 5
    assert output.shape == (4, 0, 2 * P) and h_n.shape == (4, 0, P) and c_n.shape == (4, 0, 5)
    assert x.grad is not None and x.grad.shape == x.shape
    for parameter in lstm.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize(
    "options",
    [
        Options(I=2, H=3, T=3, B=2),
        Options(I=2, H=2, T=2, B=2, bias=False, bidirectional=True),
        Options(I=2, H=3, T=2, B=2, proj_size=2, num_layers=2),
        Options(I=2, H=2, T=3, B=3, kind="unsorted", bidirectional=True),
        Options(I=2, H=3, T=3, B=2, kind="packed", proj_size=1, bias=False),
    ],
    ids=_name,
)
def test_finite_differences(options: Options) -> None:
    lstm = FusedLSTM.from_torch(options.lstm().to(DEVICE, torch.float64))
    args = arguments(options, torch.float64, DEVICE)
    names = [name for name, _ in lstm.named_parameters()]

    def run(input: torch.Tensor, h_0: torch.Tensor, c_0: torch.Tensor, *weights: torch.Tensor):  # type: ignore[no-untyped-def]
        args.input, args.hx = input, (h_0, c_0)

        def module(*inputs):  # type: ignore[no-untyped-def]
            return torch.func.functional_call(lstm, dict(zip(names, weights, strict=True)), inputs)

        return call(module, args)

    assert args.hx is not None
    inputs = [args.input, *args.hx, *(p.detach().clone() for p in lstm.parameters())]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("needed", ["input", "h_0", "c_0", "weight_hh", "weight_hr", "bias_ih"])
@pytest.mark.parametrize("kind", ["3-D", "unsorted"])
def test_one_gradient_alone(needed: str, kind: str) -> None:
    """The same bits whichever other gradients are wanted."""
    options = Options(bidirectional=True, kind=kind, proj_size=5 if needed == "weight_hr" else 0)
    lstm = FusedLSTM.from_torch(options.lstm().to(DEVICE))
    args = arguments(options, torch.float32, DEVICE)
    assert args.hx is not None
    everything = {"input": args.input, "h_0": args.hx[0], "c_0": args.hx[1]}
    everything |= dict(lstm.named_parameters())
    found = []
    for names in (list(everything), [name for name in everything if name.startswith(needed)]):
        for name, tensor in everything.items():
            tensor.requires_grad_(name in names)
        wanted = [everything[name] for name in names]
        grads = torch.autograd.grad(call(lstm, args), wanted, args.cotangents)
        found.append(dict(zip(names, grads, strict=True)))
    assert found[1]
    for name, grad in found[1].items():
        assert torch.equal(grad, found[0][name]), name


def test_sizes_of_the_benchmark_persist() -> None:
    """On a GPU as large as those the kernels are made for."""
    if torch.cuda.get_device_properties(0).multi_processor_count < 100:
        pytest.skip("needs 100 multiprocessors")
    for H in (64, 96, 128, 256, 512, 768):
        for pass_ in ("forward", "backward"):
            for operands in ("bfloat16", "float16", "tf32", "float32"):
                assert _C.cuda_plan(pass_, operands, 1024, 16, H).startswith("persistent"), H


def test_forcing() -> None:
    x = torch.randn(3, 2, 4, device=DEVICE)
    lstm = FusedLSTM(4, 5, device=DEVICE)
    assert backends()["cuda"].available
    with backend("cpu"), pytest.raises(RuntimeError, match="this one is on cuda"):
        lstm(x)
    with pytest.raises(RuntimeError, match="serves tensors on NVIDIA GPUs, and this one is on cpu"):
        lstm.cpu()(x.cpu())
    lstm = lstm.to(DEVICE, torch.complex64)
    with pytest.raises(RuntimeError, match="does not serve torch.complex64"):
        lstm(x.to(torch.complex64))
