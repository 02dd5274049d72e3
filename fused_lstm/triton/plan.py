"""Which kernel serves a call, and in what tiles: from its sizes and the device's properties."""

from functools import lru_cache
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """What a plan asks of the device; of each multiprocessor, the memory in bytes."""

    multiprocessors: int
    shared_memory: int
    cooperative: bool  # a launch can be made sure to run all its programs at once


class Plan(NamedTuple):
    """`kind` is one of those below."""

    kind: str
    block_b: int = 0
    block_h: int = 0
    split: int = 1
    block_k: int = 0
    ahead: int = 0
    warps: int = 4
    stages: int = 2
    groups: int = 0
    shared_memory: int = 0  # reckoned, bytes


_IN_WORDS = {
    "whole": "a program for a tile of the batch and a direction",
    "split": "hidden units over programs that meet at every step, W_hh kept in shared memory",
    "streamed": "hidden units over programs that meet at every step, W_hh read anew each time",
    "steps": "torch's operators, step by step",
}


def describe(chosen: Plan) -> str:
    """A plan in words."""
    words = f"{chosen.kind}: {_IN_WORDS[chosen.kind]}"
    if chosen.kind == "steps":
        return words
    return (
        f"{words}, tiles of {chosen.block_b} sequences and {chosen.block_h} units, "
        f"{chosen.warps} warps, {chosen.shared_memory} bytes of shared memory"
    )


def compile_options(chosen: Plan, nvidia: bool) -> dict[str, int]:
    """What Triton compiles the kernel of a plan with.

    A multiprocessor's shared memory holds one program of nearly every plan, so that all of a
    thread's 255 registers are there to be used. Not told so, ptxas aims at 128, for two programs,
    and spills (Triton 3.8 at H 128 and 768).
    """
    options = {"num_warps": chosen.warps, "num_stages": chosen.stages}
    return options | {"maxnreg": 255} if nvidia else options


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _whole(backward: bool, H: int, size: int) -> Plan | None:
    """W_hh in one program. 128 KiB of W_hh at most: H 128 in 16 bits, 64 in float32."""
    block_h = max(16, _power_of_two(H))
    if block_h * size > 256:
        return None
    warps = {16: 2, 32: 4, 64: 4, 128: 8}[block_h] * (2 if size == 4 and block_h == 64 else 1)
    weight = 4 * block_h * block_h * size
    # h, or the gradients of the four gates, on their way between the layouts of two products
    return Plan(
        "whole",
        block_b=16,
        block_h=block_h,
        warps=warps,
        shared_memory=weight + (4 if backward else 1) * 16 * block_h * size,
    )


def _split(
    backward: bool, H: int, B: int, D: int, size: int, tf32: bool, device: Device
) -> Plan | None:
    """W_hh kept in shared memory, 16 hidden units in a program: the narrowest tile of the batch
    whose groups all run at once, else the widest that fits."""
    slices = -(-H // 16)
    groups = device.multiprocessors // slices
    if groups == 0 or (size == 4 and H > 256 and not tf32):
        return None  # without tensor cores the unrolled products are long: half a minute to compile
    K = 4 * H if backward else H
    columns = 16 if backward else 64
    split = 8 if H >= 512 else 4
    best = None
    for block_b in (16, 32, 64):
        sums = split * block_b * columns * 4
        block_k = 16 if size == 4 else 32
        if backward and block_b != 32:
            block_k = 64 if block_b == 16 and size == 2 else 16  # 64 rows leave no registers for 32
        block_k = max(16, min(block_k, _power_of_two(-(-K // split))))
        chunk = split * block_k
        chunks = -(-K // chunk)
        weight = chunks * chunk * columns * size
        room = min(device.shared_memory - weight, 64 << 10)
        ahead = min(chunks, room // (block_b * chunk * size)) - 1
        used = weight + max((ahead + 1) * block_b * chunk * size, sums)
        # 128 registers a thread for the sums at most
        if ahead < 0 or used > device.shared_memory or sums > 512 * split * 32:
            break
        best = Plan(
            "split",
            block_b=block_b,
            block_h=16,
            split=split,
            block_k=block_k,
            ahead=ahead,
            warps=split,
            groups=groups,
            shared_memory=used,
        )
        if D * -(-B // block_b) <= groups:
            break
    return best


def _streamed(backward: bool, H: int, B: int, size: int, device: Device) -> Plan | None:
    """W_hh read anew each step, from the second cache if it holds it, by asynchronous copies."""
    for block_h in (16, 32, 64):
        groups = device.multiprocessors // -(-H // block_h)
        if groups == 0:
            continue
        block_b = 16 if B <= 16 else 32 if B <= 32 else 64
        columns = block_h if backward else 4 * block_h
        stages = 4
        for block_k in (256, 128, 64, 32) if size == 2 else (32,):
            used = stages * (block_b + columns) * block_k * size
            if used <= min(96 << 10, device.shared_memory):
                return Plan("streamed", block_b, block_h, 1, block_k, 0, 8, stages, groups, used)
    return None


@lru_cache(maxsize=1024)
def plan(
    backward: bool,
    H: int,
    B: int,
    D: int,
    projected: bool,
    dtype: torch.dtype,
    tf32: bool,
    device: Device,
) -> Plan:
    """The plan of one layer's recurrence; the kernels are compiled once for each that differs."""
    if projected or dtype is torch.float64:
        return Plan("steps")
    size = dtype.itemsize
    found = _whole(backward, H, size)
    if found is not None and found.shared_memory <= device.shared_memory:
        return found
    if device.cooperative:
        found = _split(backward, H, B, D, size, tf32, device)
        found = found or _streamed(backward, H, B, size, device)
        if found is not None:
            return found
    return Plan("steps")
