"""Row routing: cutting a batch into the rows of each chain and putting the results together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexheads.routing import Routing


class RowMap:
    """The rows of one routing, for tensors whose first dimension is the batch.

    Args:
        routing: A routing with more than one chain, or with rows named one by one.
    """

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The rows of each chain: ``(batch, ...)`` to a list of ``(rows of the chain, ...)``."""
        return [
            tensor[rows]
            if isinstance(rows, slice)
            else tensor.index_select(0, torch.tensor(rows, device=tensor.device))
            for rows in self.routing.rows(tensor.shape[0])
        ]

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        merged = torch.cat(list(parts))
        index = self.routing.index
        if index is None:
            return merged
        order = sorted(range(len(index)), key=index.__getitem__)
        back = sorted(range(len(order)), key=order.__getitem__)
        return merged.index_select(0, torch.tensor(back, device=merged.device))
