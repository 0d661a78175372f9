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

    The attention is computed inside of single adapters where they are of a kind.

    Args:
        branches: The branches; the last part of each is fused, behind the others of its branch.
        fusion: The attention; see `flexheads.methods.fusion.FusionPart`.
    """

    def __init__(self, branches: Sequence[Branch], fusion: Any) -> None:
        self.branches, self.fusion = branches, fusion
        self.parts = tuple(branch[-1] for branch in branches)
        self.replaces_norm = self.last.replaces_norm
        needs = {need for branch in branches for part in branch for need in part.needs}
        self.needs = frozenset(needs | fusion.needs)
        self.asks_before_norm = fusion.config.query_before_ln and self.last.sees != "r"
        self.alone = all(
            len(branch) == 1 and isinstance(part, ResidualPart) and part.sees == self.last.sees
            for branch, part in zip(branches, self.parts, strict=True)
        )

    @property
    def last(self) -> ResidualPart:
        """The part that the whole is for the layer; under one name only, for compiled code."""
        last: ResidualPart = self.parts[-1]
        return last

    def __call__(self, stream: Stream) -> Stream:
        """Changes the residual stream."""
        hidden, skip = self.last.enter(stream)
        query: Any = stream.x if self.asks_before_norm else hidden
        residual: Any = None
        if self.fusion.config.residual_before:
            residual = stream.x if skip is None else skip
        attended = self._attend(stream, hidden, query, residual)
        if residual is None:
            return stream.add(attended, skip)
        r = stream.r
        return Stream(None if r is None else attended + r, attended, r, stream.norm)

    def _attend(
        self, stream: Stream, hidden: Tensor, query: Tensor, residual: Tensor | None
    ) -> Tensor:
        """The attention over what the branches give, with `residual` added to each."""
        if self.alone:
            found: Tensor | None = self.fusion.attended(self.parts, hidden, query, residual)
            if found is not None:
                return found
        ups = torch.stack([self._up(branch, stream, hidden) for branch in self.branches], dim=2)
        result: Tensor = self.fusion(
            query, ups if residual is None else ups + residual.unsqueeze(2)
        )
        return result

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
