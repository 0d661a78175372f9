"""Low-rank and scaling adapters of one shape, each for some rows of a batch, as one product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexheads.sites.banks import Bank
from flexheads.sites.projection import Projection
from flexheads.sites.rows import Chosen

if TYPE_CHECKING:
    from flexheads.methods.lora_parts import Delta, Scaling


class DeltaBank(Bank["Delta"]):
    """Changes of a weight as two batched products with their factors; see `Delta.factors`."""

    first: Delta

    def __call__(self, chosen: Chosen, *args: object) -> Tensor:
        """The new result of every row; see `flexheads.sites.linear.LinearPart.forward`."""
        hidden, output, projection = args
        assert isinstance(hidden, Tensor)
        assert isinstance(output, Tensor)
        assert isinstance(projection, Projection)
        first = self.first
        down, up = self.stacked_pairs(lambda part: part.factors(), chosen)
        inner = torch.bmm(first.dropped(hidden.to(down.dtype)), down.transpose(1, 2))
        factor = self.factors(lambda part: part.scaling, chosen, inner)
        if isinstance(factor, Tensor):
            inner, factor = inner * factor, 1.0
        up = up.transpose(1, 2)
        if first.m is None and output.dtype == inner.dtype:
            return torch.baddbmm(output, inner, up, alpha=factor)
        change = (torch.bmm(inner, up) * factor).to(output.dtype)
        if first.m is None:
            return output + change
        ratio = self.stacked(lambda part: part.ratio(projection), chosen, otherwise=1.0)
        return first.turned(output, change, ratio.unsqueeze(1), projection)


class ScalingBank(Bank["Scaling"]):
    """Vectors that scale the result of a projection."""

    first: Scaling

    def __call__(self, chosen: Chosen, *args: object) -> Tensor:
        """The new result of every row; see `flexheads.sites.linear.LinearPart.forward`."""
        output = args[1]
        assert isinstance(output, Tensor)
        scale = self.stacked(lambda part: part.lora_B.view(-1) * part.scaling, chosen, 1.0)
        return output * scale.unsqueeze(1).to(output.dtype)
