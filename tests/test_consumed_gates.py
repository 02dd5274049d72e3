"""A backward that frees the graph may overwrite the saved gates; nobody else may notice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from parity import Options, arguments, call
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_lstm import FusedLSTM

LAYERS = {
    "plain": Options(I=3, H=17, T=5, B=3),
    "odd rows": Options(I=3, H=33, T=7, B=1, bias=False),
    "both directions, projected": Options(I=3, H=17, T=3, B=2, bidirectional=True, proj_size=5),
    "packed, 2 layers": Options(I=3, H=17, T=5, B=3, num_layers=2, kind="packed"),
}


class Backwards:
    """Whether each backward operator that ran was the one that overwrites, by torch's profiler: a
    dispatch mode would hold what passes through it."""

    def __enter__(self) -> Backwards:
        self.profile = torch.autograd.profiler.profile().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        ours = (event.name.partition("::lstm_backward") for event in self.profile.function_events)
        self.consumed = [rest == "_consuming" for name, _, rest in ours if name == "fused_lstm"]


class Keeps(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the gates that a forward saves, or a view of them."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.view = view

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "fused_lstm" and func._opname == "lstm_forward":
            self.gates = results[3][0] if self.view else results[3]
        return results


def training(name: str = "plain", dtype: torch.dtype = torch.float32) -> tuple[Any, list[Tensor]]:
    """A function that gives the loss, and what it depends on."""
    lstm = FusedLSTM.from_torch(LAYERS[name].lstm().to(dtype))
    args = arguments(LAYERS[name], dtype)
    args.input.requires_grad_()
    return lambda: sum(of.square().sum() for of in call(lstm, args)), [
        args.input,
        *lstm.parameters(),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LAYERS)
def test_every_backward_gives_the_same_bits(name: str, dtype: torch.dtype) -> None:
    loss, wanted = training(name, dtype)
    layers = LAYERS[name].num_layers
    kept = loss()
    with Backwards() as ran:
        found = [
            torch.autograd.grad(kept, wanted, retain_graph=True),
            torch.autograd.grad(kept, wanted, retain_graph=True),
            torch.autograd.grad(kept, wanted),
            torch.autograd.grad(loss(), wanted),
        ]
    assert ran.consumed == [False] * 2 * layers + [True] * 2 * layers
    for grads in found[1:]:
        assert all(map(torch.equal, grads, found[0]))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(kept, wanted)


def test_some_gradients_only() -> None:
    loss, wanted = training("both directions, projected")
    everything = torch.autograd.grad(loss(), wanted, retain_graph=True)
    for of, expected in zip(wanted, everything, strict=True):
        with Backwards() as ran:
            (found,) = torch.autograd.grad(loss(), of)
        assert ran.consumed == [True]
        assert torch.equal(found, expected)


def held_by_hooks(held: list[Any], how: str) -> tuple[Any, Any]:
    """pack and unpack, of which someone keeps what is handed out."""

    def pack(tensor: Tensor) -> Any:
        tensor = tensor.detach() if how != "itself" else tensor
        held.append(tensor.numpy() if how == "numpy" else tensor)
        return len(held) - 1

    def unpack(index: int) -> Tensor:
        if how == "numpy":
            return torch.from_numpy(held[index])
        return held[index].view_as(held[index]) if how == "view" else held[index]

    return pack, unpack


@pytest.mark.parametrize("how", ["itself", "detached", "view", "numpy"])
def test_hooks_that_keep_what_they_hand_out(how: str) -> None:
    loss, wanted = training()
    expected = torch.autograd.grad(loss(), wanted)
    held: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(*held_by_hooks(held, how)):
        output = loss()
    before = [torch.as_tensor(tensor).detach().clone() for tensor in held]
    with Backwards() as ran:
        found = torch.autograd.grad(output, wanted)
    assert ran.consumed == [False]
    assert all(map(torch.equal, found, expected))
    assert all(torch.equal(torch.as_tensor(a), b) for a, b in zip(held, before, strict=True))


@pytest.mark.parametrize("view", [False, True])
def test_gates_that_someone_keeps(view: bool) -> None:
    loss, wanted = training()
    expected = torch.autograd.grad(loss(), wanted)
    with Keeps(view) as kept:
        output = loss()
    before = kept.gates.clone()
    with Backwards() as ran:
        found = torch.autograd.grad(output, wanted)
    assert ran.consumed == [False]
    assert torch.equal(kept.gates, before)
    assert all(map(torch.equal, found, expected))


def test_checkpoint() -> None:
    loss, wanted = training()
    expected = torch.autograd.grad(loss(), wanted)
    lstm_loss = checkpoint(lambda _: loss(), wanted[0], use_reentrant=False)
    found = torch.autograd.grad(lstm_loss, wanted, retain_graph=True)
    again = torch.autograd.grad(lstm_loss, wanted)
    assert all(map(torch.equal, found, expected)) and all(map(torch.equal, again, expected))


def test_reentrant_checkpoint() -> None:
    lstm, x = FusedLSTM(3, 17), torch.randn(5, 2, 3, requires_grad=True)
    lstm(x)[0].sum().backward()
    expected = [of.grad.clone() for of in (x, *lstm.parameters())]
    for of in (x, *lstm.parameters()):
        of.grad = None
    with Backwards() as ran:
        checkpoint(lambda x: lstm(x)[0], x, use_reentrant=True).sum().backward()
    assert ran.consumed == [True]
    assert all(map(torch.equal, (of.grad for of in (x, *lstm.parameters())), expected))


def test_gradients_to_be_differentiated_again() -> None:
    lstm, x = FusedLSTM(3, 17), torch.randn(5, 2, 3, requires_grad=True)
    penalties = []
    for retain_graph in (True, False):  # of the forward: the gradients' own graph stays
        with Backwards() as ran:
            (grad,) = torch.autograd.grad(
                lstm(x)[0].sum(), x, create_graph=True, retain_graph=retain_graph
            )
        assert ran.consumed == [False]
        penalties.append(torch.autograd.grad(grad.square().sum(), [x, lstm.weight_hh_l0]))
    assert all(map(torch.equal, *penalties))


def in_threads(*calls: Callable[[], None]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_that_share_a_graph() -> None:
    loss, wanted = training("odd rows")
    shared = loss()
    expected = torch.autograd.grad(shared, wanted, retain_graph=True)
    wrong: list[str] = []

    def run() -> None:
        for _ in range(50):
            found = torch.autograd.grad(shared, wanted, retain_graph=True)
            if not all(map(torch.equal, found, expected)):
                wrong.append("another gradient")

    in_threads(run, run)
    assert not wrong


def test_a_thread_that_frees_the_graph() -> None:
    """Another one's backward may fail, as autograd says, but not give other gradients."""
    loss, wanted = training("odd rows")
    expected = torch.autograd.grad(loss(), wanted)
    wrong: list[str] = []

    def run(shared: Tensor, together: threading.Barrier, keeps: bool) -> None:
        together.wait()
        try:
            found = torch.autograd.grad(shared, wanted, retain_graph=keeps)
        except RuntimeError as error:
            # the second where the graph is about to be freed
            if "second time" not in str(error) and "inplace operation" not in str(error):
                wrong.append(str(error))
            return
        if not all(map(torch.equal, found, expected)):
            wrong.append("another gradient")

    for _ in range(50):
        shared, together = loss(), threading.Barrier(2)
        in_threads(*(partial(run, shared, together, keeps) for keeps in (True, False)))
    assert not wrong


def test_operators_called_by_themselves() -> None:
    lstm = FusedLSTM(3, 17)
    x, states = torch.randn(5, 2, 3), torch.zeros(1, 2, 17)
    weights = list(lstm.parameters())
    ops = torch.ops.fused_lstm
    output, h_n, c_n, gates, cells = ops.lstm_forward(x, None, states, states, weights)
    before = gates.clone()
    output.sum().backward()  # by the formula of the operator
    assert torch.equal(gates, before)
    arguments = (
        torch.ones_like(output), None, None, x, None, states, states, weights, output, gates, cells,
        [True] * 7,
    )  # fmt: skip
    with torch.no_grad():
        *expected, of_weights = ops.lstm_backward(*arguments)
        assert torch.equal(gates, before) and gates._version == 0
        *found, of_weights_too = ops.lstm_backward_consuming(*arguments)
    assert all(map(torch.equal, [*found, *of_weights_too], [*expected, *of_weights]))
    assert gates._version == 1  # known to autograd as changed, wherever else it is saved
