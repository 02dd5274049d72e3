"""Outputs, states and every gradient against nn.LSTM, over the product of its options."""

import itertools
import random

import pytest
import torch
from parity import DTYPES, Options, call, check, results

from fused_lstm import FusedLSTM, backend

SIZES = (1, 3, 17, 33)


def _product() -> list[Options]:
    """Every combination of options, each with odd sizes of its own drawn from a fixed seed."""
    draw = random.Random(0)
    cases = []
    for layers, bias, first, both, proj, hx, kind in itertools.product(
        (1, 2),
        (True, False),
        (False, True),
        (False, True),
        (False, True),
        (False, True),
        ("3-D", "2-D", "packed", "unsorted"),
    ):
        H = draw.choice(SIZES[1:] if proj else SIZES)
        P = draw.choice([size for size in (1, 3, 17) if size < H]) if proj else 0
        I, T, B = draw.choice(SIZES), draw.choice((1, 2, 3, 7)), draw.choice((1, 2, 3, 5))  # noqa: E741
        cases.append(Options(layers, bias, first, both, P, hx, kind, I, H, T, B))
    return cases


def _name(options: Options) -> str:
    flags = ("bias", "batch_first", "bidirectional", "given_hx")
    words = [options.kind, *(flag for flag in flags if getattr(options, flag))]
    sizes = "".join(f"{k}{getattr(options, k)}" for k in "IHTB")
    return f"{'-'.join(words)}-L{options.num_layers}{sizes}P{options.proj_size}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("options", _product(), ids=_name)
def test_options(options: Options, dtype: torch.dtype) -> None:
    check(options, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "options",
    [
        Options(I=129, H=129, T=17, B=33),
        Options(I=33, H=129, T=33, B=1, bidirectional=True),
        Options(I=1, H=257, T=3, B=5, proj_size=129, num_layers=2),
        Options(I=65, H=33, T=65, B=17, kind="unsorted", num_layers=2),
        Options(I=17, H=65, T=1, B=129),
    ],
    ids=_name,
)
def test_sizes_beyond_one_tile(options: Options, dtype: torch.dtype) -> None:
    if dtype is torch.float16 and options.I * options.H * options.T * options.B > 10**6:
        options = Options(I=options.I, H=options.H, T=3, B=3)  # nn.LSTM takes minutes otherwise
    check(options, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("chosen", ["cpu", "reference"])
def test_long_sequence(chosen: str, dtype: torch.dtype) -> None:
    """Errors that grow with T, such as a cell state kept too narrow, show here."""
    with backend(chosen):
        check(Options(I=3, H=17, T=300, B=2), dtype)


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(num_layers=2, bidirectional=True, proj_size=3, given_hx=False),
        Options(num_layers=2, kind="unsorted", bias=False),
        Options(batch_first=True, kind="3-D", bidirectional=True),
    ],
    ids=_name,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_reference_path(options: Options, dtype: torch.dtype) -> None:
    with backend("reference"):
        check(options, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", ["3-D", "unsorted"])
def test_same_without_gradients(kind: str, dtype: torch.dtype) -> None:
    """Inference gives the bits that training gives."""
    from parity import arguments

    options = Options(num_layers=2, bidirectional=True, kind=kind)
    lstm = FusedLSTM.from_torch(options.lstm().to(dtype))
    args = arguments(options, dtype)
    training = call(lstm, args)
    with torch.no_grad():
        for found, expected in zip(call(lstm, args), training, strict=True):
            assert found.grad_fn is None
            assert torch.equal(found, expected)
    with torch.inference_mode():
        for found, expected in zip(call(lstm, args), training, strict=True):
            assert torch.equal(found, expected)


def test_complex_takes_the_reference_path() -> None:
    options = Options(bidirectional=True, proj_size=3)
    stock = options.lstm(dtype=torch.complex128)
    fused = FusedLSTM.from_torch(stock)
    x = torch.randn(4, 2, options.I, dtype=torch.complex128)
    torch.testing.assert_close(fused(x), stock(x))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_no_sequences(batch_first: bool, proj_size: int) -> None:
    """B = 0 is a valid batch; its gradients are zeros."""
    options = Options(
        num_layers=2, batch_first=batch_first, bidirectional=True, B=0, proj_size=proj_size
    )
    for dtype in DTYPES:
        check(options, dtype, results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("how", ["sliced", "expanded", "strided", "reversed", "channels"])
def test_strides_of_the_input(how: str, dtype: torch.dtype) -> None:
    """Inputs and states of any strides give the bits that contiguous ones give."""
    T, B, I, H = 5, 3, 17, 33  # noqa: E741
    lstm = FusedLSTM(I, H, num_layers=2, dtype=dtype)
    layouts = {
        "sliced": lambda *shape: torch.randn(shape[0] + 2, *shape[1:], dtype=dtype)[2:],
        "expanded": lambda *shape: torch.randn(1, 1, shape[2], dtype=dtype).expand(shape),
        "strided": lambda *shape: torch.randn(*shape[:2], 2 * shape[2], dtype=dtype)[..., ::2],
        "reversed": lambda *shape: torch.randn(*shape[::-1], dtype=dtype).permute(2, 1, 0),
        "channels": lambda *shape: torch.randn(shape[1], shape[0], shape[2], dtype=dtype).mT.mT
        .transpose(0, 1),
    }  # fmt: skip
    make = layouts[how]
    x, h_0, c_0 = make(T, B, I), make(2, B, H), make(2, B, H)
    plain = [tensor.clone(memory_format=torch.contiguous_format) for tensor in (x, h_0, c_0)]
    for tensor in (x, h_0, c_0, *plain):
        tensor.requires_grad_()
    found = lstm(x, (h_0, c_0))
    expected = lstm(plain[0], (plain[1], plain[2]))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for output, inputs in ((found, (x, h_0, c_0)), (expected, plain)):
        # a cotangent of zero strides, as sum() makes it
        (output[0].sum() + output[1][1].sum()).backward(inputs=list(inputs))
    for tensor, other in zip((x, h_0, c_0), plain, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad, rtol=0, atol=0)


def test_strides_of_the_weights() -> None:
    lstm = FusedLSTM(3, 17, proj_size=5, bidirectional=True)
    x = torch.randn(4, 2, 3)
    expected = lstm(x)
    for parameter in lstm.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()
        else:
            parameter.data = parameter.data.repeat_interleave(2)[::2]
        assert not parameter.is_contiguous()
    torch.testing.assert_close(lstm(x), expected, rtol=0, atol=0)
