"""The CPU kernels as a machine with NEON runs them: cross-compiled, under QEMU's user emulation.

QEMU computes what the instructions say. Two things it can't show: how fast they are, and a memory
order as weak as that of arm64's own hardware.
"""

from __future__ import annotations

import ast
import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_activations as activations
import torch
from parity import (
    DTYPES,
    Arguments,
    Options,
    assert_same_bits,
    check,
    inputs_of,
    results,
)
from torch import Tensor, nn

from fused_lstm import FusedLSTM

HERE = Path(__file__).parent
KERNEL = HERE.parent / "csrc" / "cpu" / "kernel.cpp"
NATIVE = (sys.platform, platform.machine()) == ("linux", "aarch64")
COMPILER = shutil.which("g++" if NATIVE else "aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
ENUM = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # Dtype of csrc/lstm.h
OF_A_DIRECTION = 13  # results in kernel_layers/layer.h

pytestmark = [
    pytest.mark.skipif(not KERNEL.exists(), reason="needs the source tree"),
    pytest.mark.skipif(
        not COMPILER or not (NATIVE or EMULATOR),
        reason="needs g++"
        if NATIVE
        else "needs a compiler and an emulator for arm64: "
        "apt install g++-aarch64-linux-gnu qemu-user-static",
    ),
]


def kernel_flags() -> list[str]:
    """What setup.py compiles kernel.cpp with where the processor isn't x86-64."""
    tree = ast.parse((HERE.parent / "setup.py").read_text())
    values = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    flags, keep_order = (ast.literal_eval(values[name]) for name in ("KERNEL_FLAGS", "KEEP_ORDER"))
    return ["-std=c++20", "-fPIC", "-fopenmp", *flags, keep_order, "-DFUSED_LSTM_ISA=generic"]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs kernel_layers/piped.cpp on arm64."""
    target = tmp_path_factory.mktemp("arm64") / "piped"
    link = [] if NATIVE else ["-static"]  # the emulator finds no libraries of arm64 here
    sources = [str(KERNEL), str(HERE / "kernel_layers" / "piped.cpp")]
    command = [str(COMPILER), *kernel_flags(), *link, *sources, "-o", str(target)]
    subprocess.run(command, check=True, timeout=280)
    return [str(target)] if NATIVE else [str(EMULATOR), str(target)]


def test_streams(tmp_path: Path) -> None:
    """Each gives the bits of single steps, by one thread, several, and ten with a fork each."""
    target = tmp_path / "streams"
    names = "kernel stream sampler threads crowd block_cache processors dispatch".split()
    sources = [KERNEL.with_name(f"{name}.cpp") for name in names]
    sources.append(HERE / "kernel_layers" / "streams.cpp")
    flags = [*kernel_flags(), "-DFUSED_LSTM_HAVE_GENERIC", *([] if NATIVE else ["-static"])]
    command = [str(COMPILER), *flags, *map(str, sources), "-o", str(target)]
    subprocess.run(command, check=True, timeout=280)
    done = subprocess.run(
        [str(target)] if NATIVE else [str(EMULATOR), str(target)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and "48 streams, 0 failures" in done.stdout, done


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def call(
    program: list[str],
    threads: int,
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: list[Tensor],
    cotangents: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    """One layer with biases: output, grad_input and each direction's results in layer.h's order.

    Operands are those of the operators lstm_forward and lstm_backward; without cotangents there is
    no backward, and the gradients are zeros.
    """
    (D, B, P), H, I = h_0.shape, c_0.shape[2], input.shape[-1]  # noqa: E741  the field's name
    T, N = len(input if batch_sizes is None else batch_sizes), input.shape[:-1].numel()
    each = len(weights) // D
    projected = each == 5
    dy, dh, dc = cotangents or (input.new_zeros(N, D * P), h_0 * 0, c_0 * 0)
    numbers = [ENUM.index(input.dtype), T, B, I, H, P, batch_sizes is not None, projected]
    operands = [torch.tensor([*numbers, D, threads, cotangents is None])]
    operands += [] if batch_sizes is None else [batch_sizes]
    operands += [input, dy]
    for d in range(D):
        operands += [*weights[d * each : (d + 1) * each], h_0[d], c_0[d], dh[d], dc[d]]
    given = b"".join(map(raw, operands))
    done = subprocess.run(program, input=given, capture_output=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr)
    gates, cells = (N, 4 * H), (N, H)
    shapes: list[tuple[int, ...]] = [
        *((B, P), (B, H), gates, cells, gates, (B, P), (B, H)),
        *((cells, (N, P)) if projected else ((0,), (0,))),
        *((4 * H, I), (4 * H, P), (4 * H,), (P, H) if projected else (0,)),
    ]
    shapes = [(*input.shape[:-1], D * P), tuple(input.shape), *shapes * D]
    found = torch.frombuffer(bytearray(done.stdout), dtype=input.dtype)
    parts = found.split([math.prod(shape) for shape in shapes])
    output, grad_input, *others = [p.view(s) for p, s in zip(parts, shapes, strict=True)]
    return output, grad_input, [others[:OF_A_DIRECTION], others[OF_A_DIRECTION:]][:D]


def layer(program: list[str], threads: int, lstm: FusedLSTM, args: Arguments) -> dict[str, Tensor]:
    """As parity.results, by the kernels of arm64."""
    output, grad_input, directions = call(
        program, threads, *inputs_of(lstm, args), cotangents=args.cotangents
    )
    found = {"output": output, "grad input": grad_input}
    for name, place in (("h_n", 0), ("c_n", 1), ("grad h_0", 5), ("grad c_0", 6)):
        found[name] = torch.stack([own[place] for own in directions])
    grads = []
    for own in directions:
        weight_ih, weight_hh, bias, weight_hr = own[9:]
        grads += [weight_ih, weight_hh, bias, bias, *([weight_hr] if lstm.proj_size else [])]
    names = [f"grad {name}" for name, _ in lstm.named_parameters()]
    return found | dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "options",
    [
        # up to four rows: products from the weights as they lie
        Options(I=1, H=1, T=1, B=1),
        Options(I=33, H=17, T=1, B=3, bidirectional=True),
        Options(I=3, H=17, T=5, B=3),
        # large enough to share: by rows, by units with a barrier a step, by directions
        Options(I=17, H=33, T=3, B=129),
        Options(I=33, H=129, T=7, B=1),
        Options(I=33, H=33, T=5, B=33, bidirectional=True),
        Options(I=17, H=129, T=5, B=17, kind="packed"),
        Options(I=3, H=33, T=7, B=17, kind="packed", bidirectional=True, proj_size=17),
        Options(I=1, H=129, T=3, B=17, proj_size=33),
    ],
    ids=lambda o: f"{o.kind}-I{o.I}H{o.H}T{o.T}B{o.B}P{o.proj_size}D{1 + o.bidirectional}",
)
def test_layers(program: list[str], options: Options, dtype: torch.dtype) -> None:
    """Right to the rule of parity.py by one thread, the same bits by two."""

    def run(module: nn.Module, args: Arguments) -> dict[str, Tensor]:
        if not isinstance(module, FusedLSTM):
            return results(module, args)
        alone, shared = (layer(program, threads, module, args) for threads in (1, 2))
        assert_same_bits(shared, alone, "two threads")
        return alone

    check(options, dtype, run)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_sigmoid_and_tanh(
    program: list[str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/test_activations.py, read off the gates of one step whose biases are x."""

    def activated(x: Tensor) -> dict[str, Tensor]:
        H, zero = x.numel(), x.new_zeros(1, 1, 1)
        weights = [x.new_zeros(4 * H, 1), x.new_zeros(4 * H, 1)]
        weights += [x.repeat(4), x.new_zeros(4 * H), x.new_zeros(1, H)]
        own = call(program, 1, zero, None, zero, x.new_zeros(1, 1, H), weights)[2][0]
        i, f, g, o = own[2][0].split(H)
        torch.testing.assert_close((f, o), (i, i), rtol=0, atol=0, equal_nan=True)
        return {"sigmoid": i, "tanh": g}

    monkeypatch.setattr(activations, "activated", activated)
    if dtype.itemsize > 2:
        activations.test_sweep_within_stated_ulps("generic", dtype)
    else:
        activations.test_every_16_bit_value_is_rounded_once("generic", dtype)
    activations.test_limits_and_nan("generic", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_rounding_to_16_bits(program: list[str], dtype: torch.dtype) -> None:
    """Every number, to which half of another is added: ties, subnormals and infinities as torch's.

    Two units do it: their cell states stay 30, whose tanh is 1, and their gates o are 1 and 0.5, so
    that the output is the first column of weight_hr and half of the second.
    """
    a = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    a = a[a.isfinite()]
    b = a[torch.randperm(len(a))]
    x, h_0, c_0 = a.new_zeros(1, 1, 1), a.new_zeros(1, 1, len(a)), a.new_full((1, 1, 2), 30)
    bias = a.new_tensor([0, 0, 30, 30, 0, 0, 30, 0])
    weights = [a.new_zeros(8, 1), a.new_zeros(8, len(a)), bias, bias * 0, torch.stack((a, b), 1)]
    output = call(program, 1, x, None, h_0, c_0, weights)[0]
    assert torch.equal(output[0, 0], (a.float() + b.float() / 2).to(dtype))
