"""Bottlenecks of one shape, each for some rows of a batch, as batched products."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexheads.sites.banks import Bank
from flexheads.sites.direct import quiet
from flexheads.sites.shelf import Weights

if TYPE_CHECKING:
    from flexheads.methods.bottleneck import Bottleneck
    from flexheads.sites.residual import Stream


class BottleneckBank(Bank["Bottleneck"]):
    """Bottlenecks with plain projections, without norms and gates of their own."""

    def run(self, weights: Weights, factor: Tensor | float, *args: Any) -> Stream:
        """The stream of every row; see `Bottleneck.forward`."""
        stream: Stream = args[0]
        hidden, skip = self.first.enter(stream)
        delta = self._delta(weights, hidden)
        if isinstance(factor, Tensor) or factor != 1:
            delta = delta * factor
        return stream.add(delta, skip)

    def _delta(self, weights: Weights, hidden: Tensor) -> Tensor:
        """What is added to each row: ``(batch, sequence, width)`` both ways."""
        down, down_bias, up, up_bias, *learned = weights
        activation, dropout = self.first.activation, self.first.dropout
        activate = activation.forward if quiet(activation) else activation
        delta = torch.baddbmm(up_bias, activate(torch.baddbmm(down_bias, hidden, down)), up)
        if dropout.training or not quiet(dropout):
            delta = dropout(delta)
        for scaling in learned:
            delta = delta * scaling
        return delta

    def weights(self, part: Bottleneck) -> Weights:
        """Both projections, and the scaling where it is learned."""
        down, up = part.down, part.up
        learned = (part.scaling,) if isinstance(part.scaling, nn.Parameter) else ()
        return (down.weight, down.bias, up.weight, up.bias, *learned)

    def factor(self, part: Bottleneck) -> float:
        return 1.0 if isinstance(part.scaling, nn.Parameter) else part.scaling

    def folded(self, part: Bottleneck) -> Weights:
        down, down_bias, up, up_bias, *learned = self.weights(part)
        factor = self.factor(part)
        if factor != 1:
            up, up_bias = up * factor, up_bias * factor
        for scaling in learned:
            up, up_bias = up * scaling.unsqueeze(1), up_bias * scaling
        return down, down_bias, up, up_bias

    @property
    def draws(self) -> bool:
        """Whether layers are left out by chance."""
        return self.first.training and self.first.config.stochastic_depth > 0.0

    def modules(self, part: Bottleneck) -> Iterable[nn.Module]:
        """The part, and its projections."""
        return part, part.down, part.up
