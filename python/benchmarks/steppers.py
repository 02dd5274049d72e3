"""How each library takes a step of an LSTM, or draws a character, called as a server would.

Every stepper is made of the same nn.LSTM and keeps its states from call to call. What a library
wants done once (packing, building a graph, binding memory) is done when it is made.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import tempfile
from collections.abc import Callable
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
    call: Callable[[], Any]  # one step, which gives (B, H), or a loss; or some characters
    steps: int = 1  # in a call
    bytes: tuple[int, int] = (0, 0)  # of weights and of states, where it is told
    learns: bool = False  # needs gradients


def model(case: Case) -> tuple[nn.LSTM, Tensor]:
    """The LSTM of a case and its input (B, I), the same in every process."""
    torch.manual_seed(0)
    lstm = nn.LSTM(case.input_size, case.hidden_size, **case.options())
    return lstm.requires_grad_(False), torch.randn(case.B, case.input_size)


def stepper(side: str, case: Case) -> Stepper:
    lstm, x = model(case)
    if side in OURS:
        stream = FusedLSTM.from_torch(lstm).stream(case.B, weights=OURS[side])
        return Stepper(lambda: stream(x), bytes=stream.nbytes)
    return Stepper(PEERS[side](lstm, x))


def _torch(lstm: nn.LSTM, x: Tensor) -> Callable[[], Tensor]:
    hx: Any = None

    def call() -> Tensor:
        nonlocal hx
        y, hx = lstm(x[None], hx)
        return y[0]

    return call


def graph(lstm: nn.LSTM, batch_size: int) -> Any:
    """One step as an ONNX model: x, h0, c0, h1, ... -> h0_n, c0_n, h1_n, ..."""
    from onnx import TensorProto, helper, numpy_helper

    def gates(of: Tensor) -> np.ndarray[Any, Any]:
        """ONNX has them in the order i, o, f, g."""
        i, f, g, o = of.chunk(4)
        return torch.cat((i, o, f, g))[None].numpy()

    def value(name: str, size: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, batch_size, size))

    nodes, weights, H = [], [], lstm.hidden_size
    names = [f"{state}{layer}" for layer in range(lstm.num_layers) for state in "hc"]
    below = "x"
    for layer in range(lstm.num_layers):
        w_ih, w_hh, b_ih, b_hh = lstm.all_weights[layer]
        of = {"W": gates(w_ih), "R": gates(w_hh), "B": torch.cat(
            [torch.from_numpy(gates(b)) for b in (b_ih, b_hh)], 1).numpy()}  # fmt: skip
        weights += [numpy_helper.from_array(w, f"{name}{layer}") for name, w in of.items()]
        inputs = [below, *(f"{name}{layer}" for name in of), "", f"h{layer}", f"c{layer}"]
        below = f"h{layer}_n"  # (1, B, H): the layer's output of one step, too
        nodes.append(helper.make_node("LSTM", inputs, ["", below, f"c{layer}_n"], hidden_size=H))
    made = helper.make_graph(
        nodes, "step", [value("x", lstm.input_size), *(value(name, H) for name in names)],
        [value(f"{name}_n", H) for name in names], weights,
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


class _States:
    """Two sets of states in memory that a library reads and writes in place, taken in turns."""

    def __init__(self, lstm: nn.LSTM, x: Tensor) -> None:
        self.x = x[None].numpy()
        names = [f"{state}{layer}" for layer in range(lstm.num_layers) for state in "hc"]
        shape = (1, len(x), lstm.hidden_size)
        self.sets = [{name: np.zeros(shape, np.float32) for name in names} for _ in range(2)]
        self.ways = ((self.sets[0], self.sets[1]), (self.sets[1], self.sets[0]))
        self.output = f"h{lstm.num_layers - 1}"

    def call(self, takes: list[Callable[[], object]], given: np.ndarray[Any, Any]) -> Any:
        """The step: `takes` are the two turns, `given` is where they read the input."""
        outputs = [new[self.output][0] for _, new in self.ways]
        turns = itertools.cycle(zip(takes, outputs, strict=True))

        def call() -> Any:
            given[:] = self.x
            take, output = next(turns)
            take()
            return output

        return call


def _onnxruntime(lstm: nn.LSTM, x: Tensor, narrow: bool = False) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    content = graph(lstm, len(x)).SerializeToString()
    if narrow:
        content = _in_int8(content)
    session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    states = _States(lstm, x)
    given, takes = states.x.copy(), []
    for old, new in states.ways:
        binding = session.io_binding()
        binding.bind_cpu_input("x", given)
        for name in old:
            binding.bind_cpu_input(name, old[name])
            to = new[name]
            binding.bind_output(f"{name}_n", "cpu", 0, np.float32, to.shape, to.ctypes.data)
        takes.append(lambda binding=binding: session.run_with_iobinding(binding))
    return states.call(takes, given)


def _in_int8(content: bytes) -> bytes:
    """The model with ONNX Runtime's own dynamic quantisation."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it recommends a step that changes nothing here
    with tempfile.TemporaryDirectory() as folder:
        wide, narrow = Path(folder, "wide.onnx"), Path(folder, "narrow.onnx")
        wide.write_bytes(content)
        quantize_dynamic(wide, narrow, weight_type=QuantType.QInt8)
        return narrow.read_bytes()


def _openvino(lstm: nn.LSTM, x: Tensor) -> Callable[[], Any]:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f32"}  # fmt: skip
    read = core.read_model(graph(lstm, len(x)).SerializeToString())
    compiled = core.compile_model(read, "CPU", settings)
    states = _States(lstm, x)
    given, takes = states.x.copy(), []
    for old, new in states.ways:
        request = compiled.create_infer_request()
        bound = {"x": given, **old, **{f"{name}_n": of for name, of in new.items()}}
        for name, of in bound.items():
            request.set_tensor(name, openvino.Tensor(of, shared_memory=True))
        takes.append(request.infer)
    return states.call(takes, given)


PEERS: dict[str, Callable[[nn.LSTM, Tensor], Callable[[], Any]]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "onnxruntime_int8": lambda lstm, x: _onnxruntime(lstm, x, narrow=True),
    "openvino": _openvino,
}
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
