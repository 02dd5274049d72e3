"""The Triton kernels compiled ahead of time, without a GPU: registers, spills, shared memory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton isn't installed: pip install triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import fused_lstm.triton  # noqa: E402
from fused_lstm.triton.backward import backward_split, backward_whole  # noqa: E402
from fused_lstm.triton.forward import COUNTS, forward_split, forward_whole  # noqa: E402
from fused_lstm.triton.plan import Device, compile_options, plan  # noqa: E402

pytestmark = pytest.mark.skipif(
    not fused_lstm.triton.installed()[0], reason=fused_lstm.triton.installed()[1]
)

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Device(108, 163 << 10, True)),
    "sm_90": (GPUTarget("cuda", 90, 32), Device(132, 227 << 10, True)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device(304, 64 << 10, True)),
}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32


class Limit(NamedTuple):
    registers: int  # a thread; more is a change worth looking at
    shared: int  # KiB a program
    stack: int = 0  # bytes a thread: spills


# target, backward, H, B, dtype, tf32, D, packed, kind of plan: the most that Triton 3.6, 3.7.1, 3.8
# and 3.9 give, with some air; .ci/run compiles with each. An MI300's thread has 512 registers, an
# NVIDIA one's 255.
CASES: list[tuple[str, bool, int, int, torch.dtype, bool, int, bool, str, Limit]] = [
    ("sm_80", False, 64, 16, f16, False, 1, False, "whole", Limit(184, 36)),
    ("sm_80", True, 128, 16, bf16, False, 2, True, "whole", Limit(228, 150)),
    ("sm_80", False, 512, 16, bf16, False, 1, False, "split", Limit(168, 98)),
    ("sm_80", True, 512, 16, bf16, False, 1, False, "split", Limit(176, 130)),
    ("sm_90", False, 128, 16, bf16, False, 1, False, "whole", Limit(216, 134)),
    ("sm_90", True, 128, 16, bf16, False, 1, False, "whole", Limit(200, 146)),
    ("sm_90", False, 64, 16, f32, False, 1, False, "whole", Limit(255, 70)),
    ("sm_90", False, 768, 16, bf16, False, 1, False, "split", Limit(184, 130)),
    ("sm_90", True, 768, 16, bf16, False, 1, False, "split", Limit(192, 162)),
    ("sm_90", False, 1024, 64, bf16, False, 1, False, "split", Limit(255, 194)),
    ("sm_90", True, 1024, 64, bf16, False, 2, True, "split", Limit(255, 194)),
    ("sm_90", False, 512, 16, f32, True, 1, False, "split", Limit(200, 162)),
    ("sm_90", False, 2048, 16, bf16, False, 1, False, "streamed", Limit(128, 84)),
    ("sm_90", True, 2048, 16, bf16, False, 1, False, "streamed", Limit(216, 52)),
    ("gfx942", False, 64, 16, bf16, False, 1, False, "whole", Limit(400, 64)),
    ("gfx942", False, 256, 16, f16, False, 1, False, "split", Limit(256, 64)),
    ("gfx942", True, 256, 16, bf16, False, 1, False, "split", Limit(256, 64)),
]


def paths(of: Any, path: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of the pointers in a parameter, by their places in its tuples."""
    if isinstance(of, str):
        return [path]
    return [found for k, part in enumerate(of) for found in paths(part, (*path, k))]


def compiled(
    target: str,
    backward: bool,
    H: int,
    B: int,
    dtype: torch.dtype,
    tf32: bool,
    D: int,
    packed: bool,
) -> tuple[str, Any]:
    """The kind of plan and the kernel that a call of these sizes takes on this target."""
    gpu, device = TARGETS[target]
    chosen = plan(backward, H, B, D, False, dtype, tf32, device)
    whole = chosen.kind == "whole"
    pointer = f"*{TYPES[dtype]}"
    if backward:
        kernel = backward_whole if whole else backward_split
        groups = {"grads": (pointer,) * 3, "weight_hh": (pointer,) * D}
    else:
        kernel = forward_whole if whole else forward_split
        groups = {"states_n": (pointer,) * 2, "states_0": (pointer,) * 2}
        groups |= {"weight_hh": (pointer,) * D, "biases": ((pointer,) * D,) * 2}
    constants = {"H": H, "PRECISION": "tf32" if tf32 else "ieee"}
    constants |= {"BLOCK_B": chosen.block_b, "BLOCK_H": chosen.block_h}
    if packed:
        groups["packing"] = ("*i32",) * 2
    else:
        constants["packing"] = None
    if not whole:
        constants |= {"SPLIT": chosen.split, "BLOCK_K": chosen.block_k, "AHEAD": chosen.ahead}
        constants |= {"RESIDENT": chosen.kind == "split"}
    signature: dict[str, Any] = {}
    aligned = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in COUNTS:
            signature[name] = "i32"
        else:
            numbers = "*i32" if name in ("counters", "status") else pointer
            signature[name] = groups.get(name, numbers)
            for path in paths(signature[name], (index,)):
                aligned[path] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options: dict[str, Any] = compile_options(chosen, gpu.backend == "cuda")
    options["launch_cooperative_grid"] = not whole
    return chosen.kind, triton.compile(source, target=gpu, options=options)


def usage(kernel: Any, folder: Path) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        found = {key: int(count) for key, count in re.findall(r"\.(\w+_count): +(\d+)", text)}
        return found["vgpr_count"], 4 * found["vgpr_spill_count"]
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run(
        [tool, "-res-usage", cubin], check=True, capture_output=True, text=True
    ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


@pytest.fixture(scope="module", autouse=True)
def compiled_anew(tmp_path_factory: pytest.TempPathFactory):
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield


def case_name(case: tuple[Any, ...]) -> str:
    return f"{case[0]}-{case[8]}-{'bwd' if case[1] else 'fwd'}-H{case[2]}"


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_limits(case: tuple[Any, ...], tmp_path: Path) -> None:
    *sizes, kind, limit = case
    found_kind, kernel = compiled(*sizes)
    registers, stack = usage(kernel, tmp_path)
    print(f"{registers} registers, {stack} bytes of stack, {kernel.metadata.shared} shared")
    assert found_kind == kind
    assert stack <= limit.stack
    assert registers <= limit.registers
    assert kernel.metadata.shared <= limit.shared << 10


def fixed_loads(kernel: Any) -> list[str]:
    """What the loop over steps loads from or stores to the same address in each step."""
    lines = kernel.asm["ttir"].splitlines()
    waits = [at for at, line in enumerate(lines) if "acquire" in line]
    loops = [at for at, line in enumerate(lines) if "scf.for" in line]
    first = max(at for at in loops if at < waits[0]) if waits else loops[0]
    indent = re.match(" *", lines[first]).group()
    last = next(at for at in range(first, len(lines)) if lines[at].startswith(indent + "}"))
    # Whatever is computed from what the loop counts or carries.
    moving = set(re.findall(r"(%\w+) =", lines[first].split("scf.for")[1]))
    found = []
    for line in lines[first + 1 : last]:
        result, value = re.match(r" *(?:(%\w+)(?::\d+)? = )?(.*)", line).groups()
        names = re.findall(r"%\w+", value)
        if value.startswith(("tt.load ", "tt.store ")) and names[0] not in moving:
            found.append(value)
        if result and moving.intersection(names):
            moving.add(result)
    return found


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_each_step_has_its_own_addresses(case: tuple[Any, ...]) -> None:
    """What a step hands to the next is carried. Triton takes a variable for one that the loop
    leaves alone where the loop assigns it the very value that it had before, `after = row` in front
    of the loop and in it, say; the interpreter does not."""
    *sizes, kind, _ = case
    _, kernel = compiled(*sizes)
    found = fixed_loads(kernel)
    # W_hh where it is read anew in each step
    assert len(found) == (kind == "streamed"), found


def test_weights_stay(tmp_path: Path) -> None:
    """W_hh is brought to shared memory before the loop over steps, not in it; the exchange is a
    release and an acquire; the loads of h are wide."""
    _, kernel = compiled("sm_90", False, 768, 16, bf16, False, 1, False)
    ir = kernel.asm["ttgir"]
    loop = ir[ir.rindex("scf.for", 0, ir.index("acquire")) :]
    weights = re.compile(r"local_alloc %\w+ : \(tensor<8x32x64xbf16")
    assert len(weights.findall(ir)) == 3 and not weights.findall(loop)
    ptx = kernel.asm["ptx"]
    assert re.search(r"(atom|red).global.gpu.release.add.u32", ptx)
    assert re.search(r"(ld.global.gpu.acquire|atom.global.gpu.acquire)", ptx)
    assert "ld.global.cg.v4.b32" in ptx and "mma.sync" in ptx
    assert not re.search(r"(atom|red).global\S*\.b?f(16|32|64)", ptx)


@pytest.mark.parametrize("H", [768, 2048], ids=["split", "streamed"])
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "bwd"])
def test_exchange_is_ordered(backward: bool, H: int) -> None:
    """A release and an acquire of one thread order the others' stores and loads only with a barrier
    of the program in front of the one and behind the other."""
    _, kernel = compiled("sm_90", backward, H, 16, bf16, False, 1, False)
    ptx = re.sub(r"//.*|\.loc.*", "", kernel.asm["ptx"])
    released = r"bar\.sync\s+0;[^@]*@%p\d+ (?:atom|red)\.global\.gpu\.release"
    acquired = r"gpu\.acquire[^@]*@%p\d+ st\.shared[^@]*bar\.sync\s+0;"
    assert len(re.findall(released, ptx)) == ptx.count("gpu.release") >= 1
    assert len(re.findall(acquired, ptx)) == ptx.count("gpu.acquire") >= 1
    # and what others wrote is read past the multiprocessor's own cache
    assert re.search(r"ld\.global\.cg|cp\.async\.cg", ptx)


def test_no_compilation_for_other_lengths_and_batches() -> None:
    from triton_driver import calls, no_gpu

    with no_gpu() as driver:
        for H, forward, backward in (
            (16, forward_whole, backward_whole),
            (160, forward_split, backward_split),
        ):
            for kernel in (forward, backward):
                kernel.device_caches.clear()
            for T, B in ((3, 5), (1, 1), (16, 16), (1, 16), (17, 3), (2, 32), (5, 48)):
                before = driver.launches
                for call in calls(H, T, B):
                    call()
                assert driver.launches == before + 3  # calls() has run one forward
                for kernel in (forward, backward):
                    assert len(kernel.device_caches[0][0]) == 1, (T, B)
