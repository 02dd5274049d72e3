"""What holds on a GPU besides numbers: graphs, streams, the same bits, NaN and Inf, memory, and
which kernels serve a call, on both sides of each limit of theirs."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from gpu import DEVICE, PRECISIONS, check_on_gpu, kernels, tf32  # noqa: F401  the fixture
from parity import DTYPES, Arguments, Options, arguments, call
from torch import Tensor, nn
from torch.autograd import DeviceType

from fused_lstm import _C, FusedLSTM

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("kernels")]

CASES = {
    "few units": Options(I=17, H=96, T=20, B=5),
    "one team": Options(I=65, H=768, T=20, B=16),
    "packed": Options(I=33, H=257, T=20, B=17, kind="unsorted", bidirectional=True),
    "projected": Options(I=17, H=65, T=9, B=5, proj_size=33, num_layers=2),
    "two steps": Options(I=17, H=65, T=2, B=5),
}
every_case = pytest.mark.parametrize("name", CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def prepared(options: Options, dtype: torch.dtype) -> tuple[FusedLSTM, Arguments]:
    lstm = FusedLSTM.from_torch(options.lstm().to(DEVICE, dtype))
    args = arguments(options, dtype, DEVICE)
    for tensor in (args.input, *(args.hx or ())):
        tensor.requires_grad_()
    return lstm, args


def everything(module: nn.Module, args: Arguments) -> list[Tensor]:
    """Outputs, states and all gradients, without touching .grad."""
    outputs = call(module, args)
    wanted = [args.input, *(args.hx or ()), *module.parameters()]
    return [*outputs, *torch.autograd.grad(outputs, wanted, args.cotangents)]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for index, (tensor, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(tensor, other), index


@every_dtype
@every_case
def test_captured_in_a_graph(name: str, dtype: torch.dtype) -> None:
    """Forward and backward, replayed with other inputs: the bits of a call without a graph."""
    lstm, args = prepared(CASES[name], dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            everything(lstm, args)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(lstm, args)
    for _ in range(3):
        with torch.no_grad():
            args.input.copy_(torch.randn_like(args.input))
        graph.replay()
        assert_same_bits([tensor.clone() for tensor in captured], everything(lstm, args))


@every_dtype
@every_case
def test_same_bits_again(name: str, dtype: torch.dtype) -> None:
    """Whatever memory held before, and beside other work on the GPU."""
    lstm, args = prepared(CASES[name], dtype)
    expected = everything(lstm, args)
    other = torch.cuda.Stream()
    a = torch.randn(2048, 2048, device=DEVICE)
    for fill in (float("nan"), 1e30, 0.0):
        for size in (10, 1000, 100_000, 10_000_000):
            torch.full((size,), fill, device=DEVICE)
        with torch.cuda.stream(other):
            for _ in range(5):
                a @ a
        assert_same_bits(everything(lstm, args), expected)


def test_host_threads_with_different_sizes() -> None:
    """Each launches the same kernels with shared memory of its own size."""
    prepared_of = {H: prepared(Options(I=17, H=H, T=9, B=5), torch.float32) for H in (65, 257, 640)}
    expected = {H: everything(*given) for H, given in prepared_of.items()}
    torch.cuda.synchronize()

    def run(H: int) -> list[list[Tensor]]:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [everything(*prepared_of[H]) for _ in range(20)]
        torch.cuda.synchronize()
        return found

    with ThreadPoolExecutor(len(expected)) as pool:
        for H, found in zip(expected, pool.map(run, expected), strict=True):
            for results in found:
                assert_same_bits(results, expected[H])


@every_case
def test_on_a_stream_of_its_own(name: str) -> None:
    lstm, args = prepared(CASES[name], torch.float32)
    expected = everything(lstm, args)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = []
    for stream in streams:  # all at once: each call has scratch memory of its own
        with torch.cuda.stream(stream):
            found.append(everything(lstm, args))
    torch.cuda.synchronize()
    for results in found:
        assert_same_bits(results, expected)


@every_case
def test_waits_for_what_its_stream_still_does(name: str) -> None:
    lstm, args = prepared(CASES[name], torch.float32)
    expected = everything(lstm, args)
    with torch.no_grad():
        true = args.input.clone()
        args.input.zero_()
        torch.cuda.synchronize()
        a = torch.randn(4096, 4096, device=DEVICE)
        for _ in range(5):
            a @ a
        args.input.copy_(true)
    assert_same_bits(everything(lstm, args), expected)


@pytest.mark.parametrize("index", [1])
def test_on_another_device(index: int) -> None:
    if torch.cuda.device_count() <= index:
        pytest.skip("needs two GPUs")
    lstm, args = prepared(CASES["one team"], torch.float32)
    expected = everything(lstm, args)
    found = everything(lstm.to(f"cuda:{index}"), args.to(torch.float32, f"cuda:{index}"))
    for tensor, other in zip(found, expected, strict=True):
        assert tensor.device.index == index
        torch.testing.assert_close(tensor.to(DEVICE), other)


@every_dtype
@every_case
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["input", "h_0", "c_0"])
def test_nan_and_inf_pass(name: str, dtype: torch.dtype, value: float, where: str) -> None:
    """Through the sequence that has one, as in nn.LSTM; the others keep their bits, and no wait
    inside the kernels takes one of them for something else."""
    lstm, args = prepared(CASES[name], dtype)
    assert args.hx is not None
    clean = [tensor.detach().clone() for tensor in call(lstm, args)]
    with torch.no_grad():
        tensor = {"input": args.input, "h_0": args.hx[0], "c_0": args.hx[1]}[where]
        # not packed: the first sequence; packed rows: some sequence
        tensor.view(-1, tensor.shape[-1])[0, 0] = value
    stock = CASES[name].lstm().to(DEVICE, dtype)
    stock.load_state_dict(lstm.state_dict())
    outputs, expected = call(lstm, args), call(stock, args)
    for found, other in zip(outputs, expected, strict=True):
        assert torch.equal(found.isnan(), other.isnan())
    if CASES[name].num_layers == 1 and args.layout is None:
        for found, before in zip(outputs, clean, strict=True):
            assert torch.equal(found[:, 1:], before[:, 1:])
    # and back
    everything(lstm, args)
    torch.cuda.synchronize()


@every_dtype
def test_backward_in_eval_mode(dtype: torch.dtype) -> None:
    """Which cuDNN refuses."""
    lstm, args = prepared(CASES["one team"], dtype)
    expected = everything(lstm, args)
    assert_same_bits(everything(lstm.eval(), args), expected)


@every_dtype
def test_backward_again(dtype: torch.dtype) -> None:
    """What was saved is as it was."""
    lstm, args = prepared(CASES["packed"], dtype)
    outputs = call(lstm, args)
    wanted = [args.input, *lstm.parameters()]
    first = torch.autograd.grad(outputs, wanted, args.cotangents, retain_graph=True)
    again = torch.autograd.grad(outputs, wanted, args.cotangents)
    assert_same_bits(list(first), list(again))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["one team", "packed", "projected"])
def test_compiled(name: str, compiler: str) -> None:
    if compiler == "inductor":
        pytest.importorskip("triton")
    torch._dynamo.reset()
    lstm, args = prepared(CASES[name], torch.float32)
    expected = everything(lstm, args)
    compiled: Any = torch.compile(lstm, backend=compiler, fullgraph=True)
    outputs = call(compiled, args)
    wanted = [args.input, *(args.hx or ()), *lstm.parameters()]
    found = [*outputs, *torch.autograd.grad(outputs, wanted, args.cotangents)]
    assert_same_bits(found, expected)
    torch._dynamo.reset()


@every_case
def test_checked_by_torch(name: str) -> None:
    """Schema, fakes and autograd registration against what the operators do."""
    pytest.importorskip("expecttest", reason="torch's opcheck needs it")
    options = CASES[name]
    if options.num_layers > 1:
        pytest.skip("an operator is one layer")
    lstm, args = prepared(options, torch.float32)
    assert args.hx is not None
    sizes = args.layout.batch_sizes if args.layout is not None else None
    inputs = (args.input, sizes, *args.hx, list(lstm.parameters()))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fused_lstm.lstm_forward, inputs, test_utils=tests)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.fused_lstm.lstm_inference, inputs, test_utils=tests[:2])


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@every_case
def test_autocast(name: str, cast: torch.dtype) -> None:
    """Decides what is computed in: the dtypes of nn.LSTM, which cuDNN has only float16 for, and the
    bits of a module in that dtype."""
    lstm, args = prepared(CASES[name], torch.float32)
    stock = lstm.to_torch()
    with torch.no_grad():
        with torch.autocast(DEVICE, cast):
            found, expected = call(lstm, args), call(stock, args)
        assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
        computed_in = expected[0].dtype
        narrow = FusedLSTM.from_torch(CASES[name].lstm().to(DEVICE, computed_in))
        narrow.load_state_dict(lstm.state_dict())
        assert_same_bits(list(found), list(call(narrow, args.to(computed_in))))


@pytest.mark.parametrize("input", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cudnn", [True, False], ids=["cudnn", "no cudnn"])
def test_dtypes_under_autocast(
    cudnn: bool, weights: torch.dtype, input: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of nn.LSTM in bfloat16 with and without cuDNN."""
    monkeypatch.setattr(torch.backends.cudnn, "enabled", cudnn)
    stock = nn.LSTM(17, 65, device=DEVICE, dtype=weights)
    x = torch.randn(9, 5, 17, device=DEVICE, dtype=input)
    found = []
    with torch.autocast(DEVICE, torch.bfloat16):
        for module in (FusedLSTM.from_torch(stock), stock):
            output, (h_n, c_n) = module(x)
            found.append([tensor.dtype for tensor in (output, h_n, c_n)])
    assert found[0] == found[1]


def peak(run: Callable[[], Any]) -> int:
    """Bytes at most allocated during a call, beyond those before it."""
    run()  # what is kept from call to call
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        Options(I=768, H=768, T=256, B=16),
        Options(I=256, H=256, T=128, B=64, bidirectional=True, num_layers=2),
        Options(I=512, H=512, T=100, B=128),
    ],
    ids=["one team", "both directions", "many sequences"],
)
def test_memory_at_its_peak(options: Options, dtype: torch.dtype) -> None:
    """Forward and backward take no more than nn.LSTM's, which in bfloat16 copies its weights at
    each call: torch.nn.LSTM.flatten_parameters leaves them in many pieces."""
    fused, args = prepared(options, dtype)
    stock = fused.to_torch()
    own, others = peak(lambda: everything(fused, args)), peak(lambda: everything(stock, args))
    assert own <= others, f"{own / 2**20:.1f} MiB, nn.LSTM {others / 2**20:.1f} MiB"


def test_inference_saves_nothing() -> None:
    """Many layers take no more than one, and a gates' buffer."""
    lstm = FusedLSTM(256, 256, 8, device=DEVICE)
    x = torch.randn(200, 32, 256, device=DEVICE)
    rows = 200 * 32 * 256 * x.element_size()
    with torch.no_grad():
        used = peak(lambda: lstm(x))
    # the gates, input and output of the layer at work, its scratch memory
    assert used < 9 * rows, used / rows


OPERANDS = ("bfloat16", "float16", "tf32", "float32")  # in the order of plan.h


@pytest.mark.parametrize("H", [96, 512], ids=["few units", "many units"])
@pytest.mark.parametrize("precision", OPERANDS)
def test_persistent_kernels_ran(precision: str, H: int) -> None:
    """By their names: where a plan was refused, the step path would give right numbers, too."""
    dtype, allowed, _ = PRECISIONS[precision]
    lstm, args = prepared(Options(I=17, H=H, T=9, B=5), dtype)
    with tf32(allowed), torch.profiler.profile() as profile:
        everything(lstm, args)
        torch.cuda.synchronize()
    names = {event.name for event in profile.events() if event.device_type is DeviceType.CUDA}
    if not names:
        pytest.skip("torch's profiler sees no kernels here")
    # demangled or not: forward_kernel<(fused_lstm::cuda::Operands)2, ...
    which = re.compile(r"(?<![a-z_])(for|back)ward_kernel(?:<\([^)]*\)|I\w*?OperandsE)(\d)")
    found = {match.groups() for match in map(which.search, names) if match}
    assert found == {(pass_, str(OPERANDS.index(precision))) for pass_ in ("for", "back")}, names


# Up to which size a plan is what these of its words say: the size, the words, the other sizes.
EDGES = {
    "one block": ("H", "each of 1 block ", {}),
    "both directions": ("H", "2 directions", {}),
    "weights kept": ("H", " 0 bytes of weights", {}),
    "largest": ("H", "persistent", {}),
    "8 units a block": ("H", " 8 units", {}),
    "12 units a block": ("H", " 12 units", {}),
    "32 units a block": ("B", " 32 units", {"H": 512}),
    "8 rows a tile": ("B", " 8 rows", {"H": 512}),
    "16 rows a tile": ("B", " 16 rows", {"H": 512}),
    "one tile": ("B", " 1 tile ", {"H": 512}),
    "most tiles": ("B", "persistent", {"H": 512}),
    "fewest steps": ("T", "persistent", {"H": 512}),
}
REACH = {"T": 9, "B": 1025, "H": 2400}  # of the search: all edges of an H200, and little to compute


@pytest.mark.parametrize("precision", OPERANDS)
@pytest.mark.parametrize("edge", EDGES)
def test_at_the_edges_of_a_plan(edge: str, precision: str) -> None:
    """On both sides of each, forward's and backward's."""
    over, words, others = EDGES[edge]
    sizes = {"T": 5, "B": 16, "H": 64, **others}
    both = edge == "both directions"
    at = set()
    for pass_ in ("forward", "backward"):
        says = [
            words in _C.cuda_plan(pass_, precision, **{**sizes, over: size}, directions=1 + both)
            for size in range(1, REACH[over])
        ]
        changes = [n for n in range(1, len(says)) if says[n - 1] != says[n]]
        at |= {size for n in changes[-1:] for size in (n, n + 1)}
    if not at:
        pytest.skip("not within reach on this GPU")
    for size in sorted(at):
        check_on_gpu(Options(**{**sizes, over: size}, I=17, bidirectional=both), precision)


HOLD = """extern "C" __global__ void hold(int milliseconds) {
  unsigned long long from, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(from));
  do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  while (now - from < milliseconds * 1000000ull);
}"""


@pytest.mark.parametrize("B", [8, 16], ids=["room for all blocks", "no room"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda of: str(of)[6:])
def test_beside_one_that_holds_multiprocessors(
    dtype: torch.dtype, B: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another kernel has 60 of them, with all their shared memory, for five seconds: as long as it
    takes, no block takes the others for lost."""
    pytest.importorskip("torch.utils.cpp_extension", reason="torch's NVRTC wrapper needs it")
    monkeypatch.setattr("torch.utils.cpp_extension.include_paths", lambda *_: [])
    lstm, args = prepared(Options(I=65, H=768, T=20, B=B), dtype)
    expected = everything(lstm, args)
    device = torch.cuda.get_device_properties(DEVICE)
    hold = torch.cuda._compile_kernel(HOLD, "hold")
    hold.set_shared_memory_config(device.shared_memory_per_block_optin)  # one block in each
    blocks = min(60, device.multi_processor_count // 2)
    holder = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(holder):
        hold((blocks, 1, 1), (1024, 1, 1), [5000], device.shared_memory_per_block_optin)
    found = everything(lstm, args)
    assert not holder.query(), "it held them too short"
    assert_same_bits(found, expected)
