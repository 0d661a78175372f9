"""Low-rank adapters of one shape, each for some rows of a batch, as one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flexheads.methods.lora_parts import LowRank


class LowRankBank:
    """Low-rank parts of one shape, each for some rows, as two batched products.

    The factors are stacked in every call, which costs less than one product with them; so there is
    no copy that could grow old.

    Args:
        parts: The part of each chain; None for a chain that does nothing here.
    """

    def __init__(self, parts: Sequence[LowRank | None]) -> None:
        first = next(part for part in parts if part is not None)
        # A chain that does nothing here borrows a part, and counts it not at all.
        self.parts = [first if part is None else part for part in parts]
        self.factors = [0.0 if part is None else part.scaling for part in parts]
        self.alike = len(set(self.factors)) == 1

    def __call__(self, hidden: Tensor, output: Tensor, chain_of_row: Tensor) -> Tensor | None:
        """The new result of every row; see `flexheads.sites.linear.Bank`."""
        if not all(map(_at_hand, self.parts)):
            return None
        first = self.parts[0]
        dropped = first.dropout(hidden.to(first.dtype))
        down = torch.stack([part.lora_A for part in self.parts]).index_select(0, chain_of_row)
        up = torch.stack([part.lora_B for part in self.parts]).index_select(0, chain_of_row)
        inner = torch.bmm(dropped, down.transpose(1, 2))
        factor: Tensor | float = self.factors[0]
        if not self.alike:
            factor = inner.new_tensor(self.factors)[chain_of_row].view(-1, 1, 1)
        change = torch.bmm(inner * factor, up.transpose(1, 2))
        return output + change.to(output.dtype)


def _at_hand(part: LowRank) -> bool:
    """Whether a part's factors can be used without calling it: nothing hooks or offloads it."""
    hooked = part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__
    return not hooked and part.lora_A.device.type != "meta"
