"""AdapterFusion at a residual site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexheads.sites.residual import ResidualPart, Stream

Branch = Sequence[Any]
"""The parts of one branch at one site, in order; empty where the branch does nothing there."""


class Fused:
    """AdapterFusion at a residual site: attention over what each branch would add.

    Args:
        branches: The branches; the last part of each is fused, behind the others of its branch.
        fusion: The attention; see `flexheads.methods.fusion.FusionPart`.
    """

    def __init__(self, branches: Sequence[Branch], fusion: Any) -> None:
        self.branches, self.fusion = branches, fusion
        self.last: ResidualPart = branches[-1][-1]
        self.replaces_norm = self.last.replaces_norm
        needs = {need for branch in branches for part in branch for need in part.needs}
        self.needs = frozenset(needs | fusion.needs)

    def __call__(self, stream: Stream) -> Stream:
        """Changes the residual stream."""
        hidden, skip = self.last.enter(stream)
        before_norm = self.fusion.config.query_before_ln and self.last.sees != "r"
        query = stream.x if before_norm else hidden
        ups = torch.stack([self._up(branch, stream, hidden) for branch in self.branches], dim=2)
        if not self.fusion.config.residual_before:
            return stream.add(self.fusion(query, ups), skip)
        residual: Any = stream.x if skip is None else skip
        x, r = self.fusion(query, ups + residual.unsqueeze(2)), stream.r
        return Stream(None if r is None else x + r, x, r, stream.norm)

    def _up(self, branch: Branch, stream: Stream, hidden: Tensor) -> Tensor:
        """What a branch would add; those that see the same as the last need not look again."""
        own = stream
        for part in branch[:-1]:
            own = part(own)
        part = branch[-1]
        if own is not stream or part.sees != self.last.sees:
            hidden, _ = part.enter(own)
        up: Tensor = part.fused(hidden)
        return up
