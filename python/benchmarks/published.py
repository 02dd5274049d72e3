"""Others' published figures for cases that are measured here, each with its source."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import report
from benchmarks.suites import FORWARD, FORWARD_BACKWARD


@dataclass(frozen=True)
class Figure:
    """Milliseconds for one layer, one direction, all in one head: I = H."""

    who: str
    dtype: str
    B: int
    T: int
    H: int
    forward_ms: float
    forward_backward_ms: float
    gpu: str
    source: str


# One H100 SXM; the loss is the sum of the output. nn.LSTM's times have the input product and all
# weight gradients in them.
_PAPER = "FlashRNN, arXiv 2412.07752"
FIGURES = (
    Figure("FlashRNN", "bf16", 16, 1024, 768, 4.87, 13.61, "H100 SXM", _PAPER),
    Figure("nn.LSTM", "fp16", 16, 1024, 768, 2.01, 5.19, "H100 SXM", _PAPER),
    Figure("haste", "fp32", 16, 1024, 768, 18.41, 43.86, "H100 SXM", _PAPER),
)


def of(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{"FlashRNN bf16 H100 SXM": {"ms": 4.87, "over_fused": 3.2, "over_torch": 2.4}} of a row with
    times; empty where nothing is published for its sizes and pass. A figure stands beside every
    dtype: it names its own."""
    plain = not {"num_layers", "bidirectional", "proj_size", "shortest"} & row.keys()
    found = {}
    for figure in FIGURES:
        ms = {FORWARD: figure.forward_ms, FORWARD_BACKWARD: figure.forward_backward_ms}
        sizes = (figure.B, figure.T, figure.H, figure.H)
        if plain and row["pass"] in ms and sizes == (row["B"], row["T"], row["H"], row["I"]):
            facts = {"ms": ms[row["pass"]]}
            for side in ("fused", "torch"):
                if f"{side}_ms" in row:
                    facts[f"over_{side}"] = report.significant(facts["ms"] / row[f"{side}_ms"])
            found[f"{figure.who} {figure.dtype} {figure.gpu}"] = facts
    return found


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table of published figures beside the rows they belong to."""
    table = []
    for row in rows:
        for who, facts in row.get("published", {}).items():
            over = ", ".join(
                f"{facts[f'over_{side}']:.2f} x {words}"
                for side, words in (("fused", "ours"), ("torch", "nn.LSTM's here"))
                if f"over_{side}" in facts
            )
            backend = f" {row['backend']}" if "backend" in row else ""
            table.append(
                f"{row['dtype']:<5}{backend} {row['pass']:<17} {who}: {facts['ms']} ms = {over}"
            )
    return table


def document() -> list[dict[str, Any]]:
    return [asdict(figure) for figure in FIGURES]
