"""Triton's interpreter, with the programs of a launch in threads: import it before the kernels.

Triton's own runs the programs of a launch one after the other, so that one which waits for another
waits for ever. Here each has a thread: the barriers of the split kernels are run as they are, and
programs overtake each other. What this does not show: the GPU's memory order. Python's interpreter
lock makes every store visible at once, whatever a kernel says of release and acquire.
"""

from __future__ import annotations

import functools
import inspect
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl  # noqa: F401  the interpreter patches what it finds of these two
import triton.language.core as core  # noqa: F401  in the module of the function it runs
from triton.runtime import interpreter

_program = threading.local()
draw = random.Random(0)  # the order in which programs are started
one_after_the_other = False  # as in the interpreter as it is: a wait for another is for ever


def _index(scalar: Any) -> int:
    return int(np.asarray(scalar.handle.data).item())


def _widened(handle: Any) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _in_threads(fn: Callable[..., None]) -> Callable[..., None]:
    """`fn` as the interpreter calls it, once for each program: the first call runs them all."""

    @functools.wraps(fn)
    def run(**arguments: Any) -> None:
        builder = interpreter.interpreter_builder
        if builder.grid_idx != (0, 0, 0):
            return
        failures: list[BaseException] = []

        def program(index: tuple[int, int, int]) -> None:
            _program.index = index
            try:
                fn(**arguments)
            except BaseException as failure:  # noqa: BLE001  raised again below
                failures.append(failure)

        x, y, z = (range(size) for size in builder.grid_dim)
        threads = [
            threading.Thread(target=program, args=((i, j, k),)) for i in x for j in y for k in z
        ]
        draw.shuffle(threads)
        for thread in threads:
            thread.start()
            if one_after_the_other:
                thread.join()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    run.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]
    return run


def _install() -> None:
    sys.setswitchinterval(2e-4)
    builder = interpreter.InterpreterBuilder

    def get_index(self: Any) -> tuple[int, int, int]:
        return getattr(_program, "index", None) or self._grid_idx

    def set_index(self: Any, index: tuple[int, int, int]) -> None:
        self._grid_idx = index

    builder.grid_idx = property(get_index, set_index)

    init = interpreter.GridExecutor.__init__

    def init_in_threads(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.fn = _in_threads(self.fn)

    interpreter.GridExecutor.__init__ = init_in_threads

    # A poll lets the others go on.
    atomic = builder.create_atomic_rmw

    def atomic_and_yield(self: Any, *args: Any) -> Any:
        time.sleep(0)
        return atomic(self, *args)

    builder.create_atomic_rmw = atomic_and_yield

    # The interpreter multiplies bfloat16's bits as integers, and cuts off where a GPU rounds.
    def dot(self: Any, a: Any, b: Any, sums: Any, *args: Any) -> Any:
        products = np.matmul(_widened(a), _widened(b), dtype=sums.data.dtype)
        return interpreter.TensorHandle(products + sums.data, sums.dtype.scalar)

    builder.create_dot = dot
    cast = builder.cast_impl

    def cast_and_round(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            bits = np.ascontiguousarray(source.data).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            data = np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16)
            return interpreter.TensorHandle(data, kind.scalar)
        return cast(self, source, kind)

    builder.cast_impl = cast_and_round

    # The launch has patched triton.language; doing it for each call of a device function again is
    # slow, and would do it in every thread.
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call

    # Triton 3.6's is int() of an array of one element, which numpy 2.4 refuses.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", _index)

    interpreter._patch_lang_tensor = patch_tensor_and_index


_install()
