"""Edits of one shape, each for some rows of a batch, as batched products."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexheads.sites.banks import Bank
from flexheads.sites.rows import Chosen

if TYPE_CHECKING:
    from flexheads.methods.reft import ReftPart


class ReftBank(Bank["ReftPart"]):
    """Edits behind one layer, of the same tokens and of one rank."""

    def __call__(self, chosen: Chosen, *args: Any) -> Tensor:
        """The hidden states of every row; see `ReftPart.forward`."""
        hidden, tokens = args
        return self.first.edited(hidden, tokens, lambda *own: self._change(chosen, *own))

    def _change(self, chosen: Chosen, number: int, states: Tensor) -> Tensor:
        """What one of the edits adds: ``(batch, positions, width)`` both ways."""
        own: Any = lambda part: part.units[number]  # noqa: E731
        weight = self.stacked(lambda part: own(part).learned_source.weight, chosen)
        bias = self.stacked(lambda part: own(part).learned_source.bias, chosen).unsqueeze(1)
        rows = self.stacked(lambda part: own(part).projection(), chosen).to(states.dtype)
        source = torch.baddbmm(bias, states, weight.transpose(1, 2))
        change: Tensor = own(self.first).finished(states, source, rows)
        return change * self.factors(lambda part: 1.0, chosen, change)

    def modules(self, part: ReftPart) -> Iterable[nn.Module]:
        """The part, its edits, and what they multiply with."""
        return part, *part.units, *(unit.get_submodule("learned_source") for unit in part.units)
