"""Bottlenecks of one shape, each for some rows of a batch, as batched products."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexheads.sites.banks import Bank
from flexheads.sites.rows import Chosen

if TYPE_CHECKING:
    from flexheads.methods.bottleneck import Bottleneck
    from flexheads.sites.residual import Stream


class BottleneckBank(Bank["Bottleneck"]):
    """Bottlenecks with plain projections, without norms and gates of their own."""

    def __call__(self, chosen: Chosen, *args: Any) -> Stream:
        """The stream of every row; see `Bottleneck.forward`."""
        stream: Stream = args[0]
        hidden, skip = self.first.enter(stream)
        return stream.add(self.delta(chosen, hidden), skip)

    def delta(self, chosen: Chosen, hidden: Tensor) -> Tensor:
        """What is added to each row: ``(batch, sequence, width)`` both ways."""
        first = self.first
        inner = first.activation(self._linear(chosen, "down", hidden))
        up: Tensor = first.dropout(self._linear(chosen, "up", inner))
        own: Any = attrgetter("scaling")  # a number, or learned
        if isinstance(first.scaling, nn.Parameter):
            return up * self.stacked(own, chosen, 0.0).unsqueeze(1)
        factor = self.factors(own, chosen, up)
        return up * factor if isinstance(factor, Tensor) or factor != 1 else up

    def _linear(self, chosen: Chosen, name: str, hidden: Tensor) -> Tensor:
        """One of the two projections, by the weights of each row's part."""
        weight = self.stacked(lambda part: getattr(part, name).weight, chosen)
        bias = self.stacked(lambda part: getattr(part, name).bias, chosen).unsqueeze(1)
        return torch.baddbmm(bias, hidden, weight.transpose(1, 2))

    def at_hand(self, chosen: Chosen) -> bool:
        """Whether weights can be used by themselves, and no layer may be left out by chance."""
        draws = self.first.training and self.first.config.stochastic_depth > 0.0
        return not draws and super().at_hand(chosen)

    def modules(self, part: Bottleneck) -> Iterable[nn.Module]:
        """The part, and its projections."""
        return part, part.down, part.up
