"""Edits of one shape, each for some rows of a batch, as batched products."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flexheads.sites.banks import Bank
from flexheads.sites.shelf import Weights

if TYPE_CHECKING:
    from flexheads.methods.reft import ReftPart

_EACH = 3
"""Weights of one edit: those of the source, its bias, and the projection."""


class ReftBank(Bank["ReftPart"]):
    """Edits behind one layer, of the same tokens and of one rank."""

    def run(self, weights: Weights, factor: Tensor | float, *args: Any) -> Tensor:
        """The hidden states of every row; see `ReftPart.forward`."""
        hidden, tokens = args
        return self.first.edited(hidden, tokens, lambda *own: self._change(weights, *own))

    def _change(self, weights: Weights, number: int, states: Tensor) -> Tensor:
        """What one of the edits adds: ``(batch, positions, width)`` both ways."""
        weight, bias, rows = weights[_EACH * number :][:_EACH]
        source = torch.baddbmm(bias, states, weight)
        unit: Any = self.first.units[number]
        change: Tensor = unit.finished(states, source, rows.transpose(1, 2).to(states.dtype))
        return change

    def weights(self, part: ReftPart) -> Weights:
        units: Any = part.units
        sources = [(unit.learned_source, unit.projection()) for unit in units]
        return tuple(w for own, rows in sources for w in (own.weight, own.bias, rows))

    def modules(self, part: ReftPart) -> Iterable[nn.Module]:
        """The part, its edits, and what they multiply with."""
        return part, *part.units, *(unit.get_submodule("learned_source") for unit in part.units)
