"""How each library takes a step or a sequence of an LSTM, or draws a character, as a server would.

Every side is made of the same nn.LSTM, and steps keep their states from call to call. What a
library wants done once (packing, building a graph, binding memory) is done when it is made.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.suites import Case
from fused_lstm import FusedLSTM

OURS = {"fp32": None, "bf16": torch.bfloat16, "int8": torch.int8}  # by the weights' width
VOCABULARY, CHARACTERS = 61, 64  # of the text, and that one of our calls draws


class Stepper(NamedTuple):
    call: Callable[[], Any]  # one step, which gives (B, H), or a loss; a sequence; some characters
    steps: int = 1  # in a call
    bytes: tuple[int, int] = (0, 0)  # of weights and of states, where it is told
    learns: bool = False  # needs gradients


Arrays = dict[str, np.ndarray[Any, Any]]  # by their names in a graph
# Where a call is to read and to write. A library has the addresses only: the memory has to stay.
Bind = Callable[[Arrays], Callable[[], object]]


def model(case: Case) -> tuple[nn.LSTM, Tensor]:
    """The LSTM of a case and its input (T, B, I), the same in every process."""
    torch.manual_seed(0)
    lstm = nn.LSTM(case.input_size, case.hidden_size, **case.options())
    return lstm.requires_grad_(False), torch.randn(case.T, case.B, case.input_size)


def stepper(side: str, case: Case) -> Stepper:
    """A step a call, of one direction, which goes on from the last one's states."""
    lstm, x = model(case)
    if side in OURS:
        step, stream = x[0], FusedLSTM.from_torch(lstm).stream(case.B, weights=OURS[side])
        return Stepper(lambda: stream(step), bytes=stream.nbytes)
    if side == "torch":
        return Stepper(_torch(lstm, x))
    return Stepper(_stepping(LIBRARIES[side](graph(lstm, x, states=True)), lstm, x))


def sequence(side: str, case: Case) -> Stepper:
    """A whole sequence a call, from zero states, which gives (T, B, D * H). What isn't torch finds
    its input where it reads it: a copy isn't timed."""
    lstm, x = model(case)
    if side in ("torch", "fp32"):
        return Stepper(_inferring(lstm if side == "torch" else FusedLSTM.from_torch(lstm), x))
    memory = {"x": x.numpy(), "y": np.empty((case.T, case.B, case.width), np.float32)}
    take = LIBRARIES[side](graph(lstm, x, states=False))(memory)

    def call() -> Any:
        take()
        return memory["y"]

    return Stepper(call)


def _torch(lstm: nn.LSTM, x: Tensor) -> Callable[[], Tensor]:
    hx: Any = None

    def call() -> Tensor:
        nonlocal hx
        y, hx = lstm(x, hx)
        return y[0]

    return call


def _inferring(lstm: nn.LSTM | FusedLSTM, x: Tensor) -> Callable[[], Tensor]:
    lstm.eval()

    def call() -> Tensor:
        with torch.inference_mode():
            y, _ = lstm(x)
        return y

    return call


def graph(lstm: nn.LSTM, x: Tensor, states: bool) -> bytes:
    """The LSTM over x (T, B, I) as an ONNX model: x -> y (T, B, D * H), from zero states. With
    `states` it is one step of one direction: x, h0, c0, h1, ... -> h0_n, c0_n, h1_n, ..."""
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    (T, B, _), H, D = x.shape, lstm.hidden_size, 1 + lstm.bidirectional
    direction = "bidirectional" if D > 1 else "forward"
    layer_of = partial(helper.make_node, "LSTM", hidden_size=H, direction=direction)
    constants = {} if states else {"shape": np.array([T, B, D * H])}
    nodes, below = [], "x"
    for layer in range(lstm.num_layers):
        of = {f"{name}{layer}": array for name, array in _weights(lstm, layer).items()}
        constants |= of
        if states:
            inputs = [below, *of, "", f"h{layer}", f"c{layer}"]
            below = f"h{layer}_n"  # (1, B, H): the layer's output of one step, too
            nodes.append(layer_of(inputs, ["", below, f"c{layer}_n"]))
            continue
        apart, beside = f"apart{layer}", f"beside{layer}"  # (T, D, B, H), (T, B, D, H)
        nodes.append(layer_of([below, *of], [apart]))
        if D > 1:
            nodes.append(helper.make_node("Transpose", [apart], [beside], perm=[0, 2, 1, 3]))
        below = "y" if layer == lstm.num_layers - 1 else f"y{layer}"
        nodes.append(helper.make_node("Reshape", [beside if D > 1 else apart, "shape"], [below]))
    names = _states(lstm) if states else []
    made = helper.make_graph(
        nodes, "lstm", [value("x", *x.shape), *(value(name, 1, B, H) for name in names)],
        [value(f"{name}_n", 1, B, H) for name in names] or [value("y", T, B, D * H)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    opset = helper.make_opsetid("", 14)
    return helper.make_model(made, opset_imports=[opset], ir_version=8).SerializeToString()


def _states(lstm: nn.LSTM) -> list[str]:
    """Their names in a graph."""
    return [f"{state}{layer}" for layer in range(lstm.num_layers) for state in "hc"]


def _weights(lstm: nn.LSTM, layer: int) -> Arrays:
    """A layer's as ONNX has them: W (D, 4H, I), R (D, 4H, H) and B (D, 8H), in each the gates in
    the order i, o, f, g."""
    D = 1 + lstm.bidirectional

    def gates(of: tuple[Tensor, ...]) -> Tensor:
        each = torch.stack(of)
        i, f, g, o = each.chunk(4, 1)
        return torch.cat((i, o, f, g), 1)

    w, r, *b = map(gates, zip(*lstm.all_weights[layer * D : (layer + 1) * D], strict=True))
    return {"W": w.numpy(), "R": r.numpy(), "B": torch.cat(b, 1).numpy()}


def _stepping(bind: Bind, lstm: nn.LSTM, x: Tensor) -> Callable[[], Any]:
    """Steps with two sets of states in memory, which are read and written in turns."""
    names, shape = _states(lstm), (1, x.shape[1], lstm.hidden_size)
    one, other = ({name: np.zeros(shape, np.float32) for name in names} for _ in range(2))
    told = x.numpy()
    given, turns = told.copy(), []
    for old, new in ((one, other), (other, one)):
        memory = {"x": given, **old, **{f"{name}_n": of for name, of in new.items()}}
        turns.append((bind(memory), new[f"h{lstm.num_layers - 1}"][0], memory))
    turn = itertools.cycle(turns)

    def call() -> Any:
        given[:] = told
        take, output, _ = next(turn)
        take()
        return output

    return call


def _onnxruntime(content: bytes) -> Bind:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    inputs = {of.name for of in session.get_inputs()}

    def bind(memory: Arrays) -> Callable[[], object]:
        binding = session.io_binding()
        for name, of in memory.items():
            if name in inputs:
                binding.bind_cpu_input(name, of)
            else:
                binding.bind_output(name, "cpu", 0, np.float32, of.shape, of.ctypes.data)
        return lambda: session.run_with_iobinding(binding)

    return bind


def _onnxruntime_int8(content: bytes) -> Bind:
    """With ONNX Runtime's own dynamic quantisation."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it recommends a step that changes nothing here
    with tempfile.TemporaryDirectory() as folder:
        wide, narrow = Path(folder, "wide.onnx"), Path(folder, "narrow.onnx")
        wide.write_bytes(content)
        quantize_dynamic(wide, narrow, weight_type=QuantType.QInt8)
        return _onnxruntime(narrow.read_bytes())


def _openvino(content: bytes) -> Bind:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32"}  # fmt: skip
    compiled = core.compile_model(core.read_model(content), "CPU", settings)

    def bind(memory: Arrays) -> Callable[[], object]:
        request = compiled.create_infer_request()
        for name, of in memory.items():
            request.set_tensor(name, openvino.Tensor(of, shared_memory=True))
        return request.infer

    return bind


LIBRARIES: dict[str, Callable[[bytes], Bind]] = {
    "onnxruntime": _onnxruntime,
    "onnxruntime_int8": _onnxruntime_int8,
    "openvino": _openvino,
}
PEERS = ("torch", *LIBRARIES)
NEEDS = {
    "onnxruntime": ("onnxruntime", "onnx"),
    "onnxruntime_int8": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
}


def missing(side: str) -> str:
    """Which package a side wants that isn't installed; "" where there is none."""
    there = importlib.util.find_spec
    return next((name for name in NEEDS.get(side, ()) if there(name) is None), "")


def versions(sides: tuple[str, ...]) -> dict[str, str]:
    """Of the packages that the sides need."""
    names = dict.fromkeys(name for side in sides for name in NEEDS.get(side, ()))
    there = importlib.util.find_spec
    return {name: metadata.version(name) if there(name) else "not installed" for name in names}


def drawer(side: str, case: Case) -> Stepper:
    """Text as `charlm sample` draws it, or as the source documents' loop over nn.LSTM does, which
    draws one text only. Input as wide as the vocabulary is one-hot, else an embedding's."""
    lstm, _ = model(case)
    V = VOCABULARY
    embedding = None if case.input_size == V else nn.Embedding(V, case.input_size)
    head = nn.Linear(case.hidden_size, V)
    if side == "torch":
        return Stepper(_loop(lstm, head, embedding))
    from fused_lstm.generation import Choice, Sampler

    fused = FusedLSTM.from_torch(lstm)
    sampler = Sampler(fused, head, case.B, embedding=embedding, weights=OURS[side])
    generator, choice = torch.Generator().manual_seed(0), Choice()
    ids = torch.zeros(case.B, 1, dtype=torch.int64)

    def call() -> None:
        nonlocal ids
        ids = sampler.draw(ids, CHARACTERS, choice, generator)[:, -1:]

    return Stepper(call, steps=CHARACTERS * case.B)


def _loop(lstm: nn.LSTM, head: nn.Linear, embedding: nn.Embedding | None) -> Callable[[], None]:
    """Their `predict`, characters and ids looked up in dictionaries."""
    characters = dict(enumerate(map(chr, range(32, 32 + head.out_features))))
    ids = {character: at for at, character in characters.items()}
    drawn: list[str] = [" "]
    hx: Any = None

    def call() -> None:
        nonlocal hx
        given = torch.tensor([[ids[drawn[-1]]]])
        if embedding is None:
            features = nn.functional.one_hot(given, head.out_features).float()
        else:
            features = embedding(given)
        output, hx = lstm(features, hx)
        p = nn.functional.softmax(head(output[0]), dim=1)
        drawn.append(characters[int(torch.multinomial(p[0], 1).item())])

    return call
