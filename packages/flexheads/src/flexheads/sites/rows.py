"""Row routing: cutting a batch into the rows of each chain and putting the results together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flexheads.routing import Routing


class _Order(NamedTuple):
    """How rows that are named one by one lie chain by chain.

    Attributes:
        there: The rows in the order of their chains.
        back: The inverse.
        sizes: Rows of each chain.
    """

    there: Tensor
    back: Tensor
    sizes: list[int]


class RowMap:
    """The rows of one routing, for tensors whose first dimension is the batch.

    Args:
        routing: A routing with more than one chain, or with rows named one by one.
    """

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self._orders: dict[torch.device, _Order] = {}
        self._chains: dict[tuple[int, torch.device], Tensor] = {}

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The rows of each chain: ``(batch, ...)`` to a list of ``(rows of the chain, ...)``."""
        rows = self.routing.rows(tensor.shape[0])
        if self.routing.index is None:
            return [tensor[own] for own in rows]
        order = self._order(tensor.device)
        return list(torch.split(tensor.index_select(0, order.there), order.sizes))

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        merged = torch.cat(list(parts))
        if self.routing.index is None:
            return merged
        return merged.index_select(0, self._order(merged.device).back)

    def chain_of_row(self, batch: int, device: torch.device) -> Tensor:
        """The number of each row's chain, ``(batch,)``."""
        key = (batch, device)
        found = self._chains.get(key)
        if found is None:
            numbers = [0] * batch
            for chain, rows in enumerate(self.routing.rows(batch)):
                for row in range(batch)[rows] if isinstance(rows, slice) else rows:
                    numbers[row] = chain
            found = _constant(numbers, device)
            if not torch.compiler.is_compiling():  # what is made while tracing must not outlive it
                self._chains[key] = found
        return found

    def _order(self, device: torch.device) -> _Order:
        found = self._orders.get(device)
        if found is None:
            index = self.routing.index or ()
            order = sorted(range(len(index)), key=index.__getitem__)
            back = sorted(range(len(order)), key=order.__getitem__)
            sizes = [index.count(chain) for chain in range(len(self.routing.chains))]
            found = _Order(_constant(order, device), _constant(back, device), sizes)
            if not torch.compiler.is_compiling():
                self._orders[device] = found
        return found


def _constant(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers that outlive the call, also one in inference mode."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, device=device)
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)
