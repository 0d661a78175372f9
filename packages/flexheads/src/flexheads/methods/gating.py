"""The learned gate of UniPELT, which bottlenecks, low-rank products and prefixes share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexheads.sites.recording import record


def new_gate(width: int, gates: int = 1) -> nn.Linear:
    """A new gate on hidden states of that width."""
    gate = nn.Linear(width, gates)
    nn.init.normal_(gate.weight, std=0.02)
    nn.init.zeros_(gate.bias)
    return gate


def gate_scores(part: nn.Module, gate: nn.Linear, hidden: Tensor) -> Tensor:
    """The gate of each row: ``mean over the sequence of sigmoid(G h)`` (arXiv:2110.07577).

    Args:
        part: The part that the gate belongs to; its scores are shown to who asks.
        gate: The gate.
        hidden: ``(batch, sequence, width)``.

    Returns:
        ``(batch, gates, 1)``.
    """
    scores = torch.sigmoid(gate(hidden)).mean(dim=1).unsqueeze(-1)
    record("gate", part, scores)
    return scores
