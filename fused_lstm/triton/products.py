"""The large products of the backward, outside of the time loop. Sums in float32, no atomics."""

import torch
from torch import Tensor


def grad_h_0(
    dgates: Tensor, w_hh: Tensor, sizes: list[int] | None, B: int, reverse: bool
) -> Tensor:
    """(B, P): from the gate gradients of each sequence's first step, (N, 4H)."""
    if not reverse:
        first = dgates[:B]
    elif sizes is None:
        first = dgates[dgates.shape[0] - B :]
    else:
        # Row b's sequence begins, in reverse, at the last step that has more than b rows.
        rows, row = [0] * B, 0
        for size in sizes:
            rows[:size] = range(row, row + size)
            row += size
        first = dgates.index_select(0, torch.tensor(rows, device=dgates.device))
    return first @ w_hh


def grad_w_hh(
    dgates: Tensor,
    output: Tensor,
    h_0: Tensor,
    sizes: list[int] | None,
    reverse: bool,
) -> Tensor:
    """(4H, P): of dgates (N, 4H) and each row's h of the step before. `output` is this direction's
    (N, P), in rows of any stride; h_0 (B, P)."""
    B, N = h_0.shape[0], dgates.shape[0]
    if sizes is not None:
        # Each row's h in the rows of the output, with those of h_0 after them.
        rows: list[int] = []
        row = before = 0
        for t, size in enumerate(sizes):
            if reverse:
                after = sizes[t + 1] if t + 1 < len(sizes) else 0
                rows += range(row + size, row + size + after)
                rows += range(N + after, N + size)
            elif t == 0:
                rows += range(N, N + size)
            else:
                rows += range(before, before + size)
            before = row
            row += size
        source = torch.cat((output, h_0))
        return dgates.t() @ source.index_select(0, torch.tensor(rows, device=dgates.device))
    if reverse:
        grad = dgates[N - B :].t() @ h_0
        return grad.addmm_(dgates[: N - B].t(), output[B:]) if N > B else grad
    grad = dgates[:B].t() @ h_0
    return grad.addmm_(dgates[B:].t(), output[: N - B]) if N > B else grad
