"""The LSTM of one layer, all its directions, in plain PyTorch.

What every backend is tested against, and the path that serves transforms (vmap, jvp, double
backward), devices and dtypes that no compiled backend serves. Only differentiable operators without
mutation, so that it composes with torch.func.

The equations are those of `torch.nn.LSTM`, with the projection of Sak, Senior and Beaufays,
"Long Short-Term Memory Based Recurrent Neural Network Architectures for Large Vocabulary Speech
Recognition", 2014 (https://arxiv.org/abs/1402.1128).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

# Gate sums and states are kept in float32 where the input is narrower.
_ACCUMULATE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def dtype_of_sums(dtype: torch.dtype) -> torch.dtype:
    return _ACCUMULATE.get(dtype, dtype)


def lstm_layer(
    input: Tensor,
    batch_sizes: Tensor | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer, all its directions.

    Args:
        input: (T, B, I), or packed rows (N, I) when `batch_sizes` is given; without I, int64 ids
            of one-hot rows, and w_ih in the dtype of sums, float32 for 16 bits.
        batch_sizes: None, or (T,) int64 on the CPU, non-increasing: the rows of each step.
        h_0: (D, B, P), D = 1 or 2 directions; the second runs from the last step to the first.
        c_0: (D, B, H); P = H when there is no projection.
        weights: D times w_ih (4H, I), w_hh (4H, P), b_ih (4H), b_hh (4H), w_hr (P, H); the biases,
            the projection or both left out of every direction alike. Gate order i, f, g, o.

    Returns:
        output (T, B, D*P) or packed (N, D*P), h_n (D, B, P), c_n (D, B, H), in the states' dtype.
    """
    directions = h_0.shape[0]
    each = len(weights) // directions
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    outputs, h_n, c_n = [], [], []
    for direction in range(directions):
        output, h, c = _one_direction(
            input,
            sizes,
            h_0[direction],
            c_0[direction],
            weights[direction * each : (direction + 1) * each],
            reverse=direction == 1,
        )
        outputs.append(output)
        h_n.append(h)
        c_n.append(c)
    output = outputs[0] if directions == 1 else torch.cat(outputs, -1)
    return output, torch.stack(h_n), torch.stack(c_n)


def _one_direction(
    input: Tensor,
    sizes: list[int] | None,
    h_0: Tensor,
    c_0: Tensor,
    weights: Sequence[Tensor],
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = h_0.dtype
    wide = dtype_of_sums(dtype)
    w_ih, w_hh = weights[0].to(wide), weights[1].to(wide)
    b_ih, b_hh = (weights[2].to(wide), weights[3].to(wide)) if len(weights) > 3 else (None, None)
    w_hr = weights[-1].to(wide) if len(weights) in (3, 5) else None

    if input.dtype is torch.int64:
        gates_input = embedding(input, w_ih.t())  # (T, B, 4H) or (N, 4H)
        gates_input = gates_input if b_ih is None else gates_input + b_ih
    else:
        gates_input = linear(input.to(wide), w_ih, b_ih)
    steps = gates_input.unbind(0) if sizes is None else gates_input.split(sizes)
    rows = [step.shape[0] for step in steps]
    order = range(len(steps) - 1, -1, -1) if reverse else range(len(steps))

    # The sequences of a packed batch are sorted by length, longest first. Forward, `h` and `c` lose
    # the rows whose sequence has ended; in reverse, they gain those whose sequence begins.
    h, c = h_0[: rows[order[0]]].to(wide), c_0[: rows[order[0]]].to(wide)
    ended_h: list[Tensor] = []
    ended_c: list[Tensor] = []
    outputs: list[Tensor] = []
    before = rows[order[0]]
    for t in order:
        now = rows[t]
        if now < before:
            ended_h.append(h[now:])
            ended_c.append(c[now:])
            h, c = h[:now], c[:now]
        elif now > before:
            h = torch.cat([h, h_0[before:now].to(wide)])
            c = torch.cat([c, c_0[before:now].to(wide)])
        before = now
        i, f, g, o = (steps[t] + linear(h, w_hh, b_hh)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        if w_hr is not None:
            h = linear(h, w_hr)
        outputs.append(h.to(dtype))
    if reverse:
        outputs.reverse()
    if ended_h:
        h = torch.cat([h, *reversed(ended_h)])
        c = torch.cat([c, *reversed(ended_c)])
    output = torch.stack(outputs) if sizes is None else torch.cat(outputs)
    return output, h.to(dtype), c.to(dtype)
