"""Exits with 0 if the installed package has its CUDA kernels in it and says so without a GPU.

What .ci/run starts beside a torch with CUDA; no GPU is used where there is one.
"""

from __future__ import annotations

import os
import sys

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

import fused_lstm

OPERATORS = ("lstm_inference", "lstm_forward", "lstm_backward", "lstm_backward_consuming")


def main() -> str:
    """What is wrong; empty if nothing is."""
    cuda = fused_lstm.backends()["cuda"]
    print(fused_lstm.backends())
    for name in OPERATORS:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_lstm::{name}", "CUDA"):
            return f"the operator {name} has no kernel for CUDA"
    if cuda.available or "built" not in cuda.detail or "no GPU visible" not in cuda.detail:
        return f"backends() says of cuda: {cuda}"
    lstm = fused_lstm.FusedLSTM(3, 5)
    lstm(torch.randn(7, 2, 3))[0].sum().backward()
    if lstm.weight_hh_l0.grad is None or not lstm.weight_hh_l0.grad.isfinite().all():
        return "a step on the CPU beside the CUDA kernels went wrong"
    return ""


if __name__ == "__main__":
    sys.exit(main() or 0)  # an empty string would be an error, too
