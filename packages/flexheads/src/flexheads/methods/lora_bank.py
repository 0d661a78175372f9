"""Low-rank and scaling adapters of one shape, each for some rows of a batch, as one product."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexheads.sites.banks import Bank
from flexheads.sites.projection import Projection
from flexheads.sites.shelf import Weights

if TYPE_CHECKING:
    from flexheads.methods.lora_parts import Delta, Scaling


class DeltaBank(Bank["Delta"]):
    """Changes of a weight as two batched products with their factors; see `Delta.factors`."""

    first: Delta

    def run(self, weights: Weights, factor: Tensor | float, *args: Any) -> Tensor:
        """The new result of every row; see `flexheads.sites.linear.LinearPart.forward`."""
        hidden, output, projection = args
        assert isinstance(projection, Projection)
        first, (down, up, *ratio) = self.first, weights
        if hidden.dtype != down.dtype:
            hidden = hidden.to(down.dtype)
        inner = torch.bmm(first.dropped(hidden), down)
        if isinstance(factor, Tensor):
            inner, factor = inner * factor, 1.0
        if not ratio and output.dtype == inner.dtype:
            return torch.baddbmm(output, inner, up, alpha=factor)
        change = (torch.bmm(inner, up) * factor).to(output.dtype)
        return first.turned(output, change, ratio[0], projection) if ratio else output + change

    def weights(self, part: Delta) -> Weights:
        factors = part.factors()
        return factors if part.m is None else (*factors, part.ratio(self.site))

    def factor(self, part: Delta) -> float:
        return part.scaling

    def folded(self, part: Delta) -> Weights:
        down, up, *ratio = self.weights(part)
        return (down, up if part.scaling == 1 else up * part.scaling, *ratio)

    def idle(self, like: Weights) -> Weights:
        down, up, *ratio = like
        return (torch.zeros_like(down), torch.zeros_like(up), *map(torch.ones_like, ratio))

    def read(self, part: Delta) -> Iterable[nn.Module]:
        """What several parts share, and the projection where its weight counts."""
        shared: Iterable[nn.Module] = getattr(part, "shared", ())
        return shared if part.m is None else (*shared, self.site.host)


class ScalingBank(Bank["Scaling"]):
    """Vectors that scale the result of a projection."""

    first: Scaling

    def run(self, weights: Weights, factor: Tensor | float, *args: Any) -> Tensor:
        """The new result of every row; see `flexheads.sites.linear.LinearPart.forward`."""
        output: Tensor = args[1]
        return output * weights[0].to(output.dtype)

    def weights(self, part: Scaling) -> Weights:
        vector = part.lora_B.view(-1)
        return (vector if part.scaling == 1 else vector * part.scaling,)

    def idle(self, like: Weights) -> Weights:
        return tuple(map(torch.ones_like, like))
