"""Row routing: cutting a batch into the rows of each chain and putting the results together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flexheads.routing import Routing
from flexheads.sites.runtime import Runtime


class Chosen:
    """Which of the chains have rows, and which of them each row follows.

    Attributes:
        present: The numbers of these chains, in order.
        known: For each row a place in `present`; None where nothing but a tensor tells.

    Args:
        present: As above.
        known: As above.
        device: Where weights are picked.
        places: The same as `known`, where that is None, ``(batch,)``.
    """

    def __init__(
        self,
        present: Sequence[int],
        known: tuple[int, ...] | None,
        device: torch.device,
        places: Tensor | None = None,
    ) -> None:
        self.present, self.known = present, known
        self._device, self._places = device, places

    def by_row(self, each: Tensor) -> Tensor:
        """For each row what belongs to its chain: ``(present, ...)`` to ``(batch, ...)``."""
        if self.known == tuple(range(len(self.present))):
            return each
        if self._places is None:
            self._places = _constant(self.known or (), self._device)
        return each.index_select(0, self._places)


class RowMap(Protocol):
    """The rows of each chain, for tensors whose first dimension is the batch."""

    def present(self, batch: int) -> Sequence[int]:
        """The numbers of the chains that `split` gives rows for, in a batch of so many rows."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The rows of each chain that is present: ``(batch, ...)`` to ``(its rows, ...)``."""

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""

    def chosen(self, batch: int, device: torch.device) -> Chosen:
        """The chain of each row, to pick weights by."""


class _Order(NamedTuple):
    """How rows that are named one by one lie chain by chain.

    Attributes:
        there: The rows in the order of their chains.
        back: The inverse.
        sizes: Rows of each chain that has any.
    """

    there: Tensor
    back: Tensor
    sizes: list[int]


class KnownRows(RowMap):
    """Rows that are known before the call.

    Args:
        routing: A routing with more than one chain, or with rows named one by one.
    """

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self._kept: dict[Hashable, Any] = {}

    def present(self, batch: int) -> Sequence[int]:
        return self._once(batch, lambda: self._present(batch))  # type: ignore[no-any-return]

    def _present(self, batch: int) -> list[int]:
        rows = enumerate(self.routing.rows(batch))
        return [number for number, own in rows if len(_numbers(own, batch))]

    def split(self, tensor: Tensor) -> list[Tensor]:
        batch = tensor.shape[0]
        if self.routing.index is None:
            rows = self.routing.rows(batch)
            return [tensor[rows[number]] for number in self.present(batch)]
        self.present(batch)  # refuses another number of rows
        order = self._order(tensor.device)
        return list(torch.split(tensor.index_select(0, order.there), order.sizes))

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        merged = torch.cat(list(parts))
        if self.routing.index is None:
            return merged
        return merged.index_select(0, self._order(merged.device).back)

    def chosen(self, batch: int, device: torch.device) -> Chosen:
        key = (batch, device)
        return self._once(key, lambda: self._chosen(batch, device))  # type: ignore[no-any-return]

    def _chosen(self, batch: int, device: torch.device) -> Chosen:
        present, known = self.present(batch), [0] * batch
        rows = self.routing.rows(batch)
        for place, number in enumerate(present):
            for row in _numbers(rows[number], batch):
                known[row] = place
        return Chosen(present, tuple(known), device)

    def _order(self, device: torch.device) -> _Order:
        return self._once(device, lambda: self._new_order(device))  # type: ignore[no-any-return]

    def _new_order(self, device: torch.device) -> _Order:
        index = self.routing.index or ()
        order = sorted(range(len(index)), key=index.__getitem__)
        back = sorted(range(len(order)), key=order.__getitem__)
        sizes = [index.count(number) for number in self.present(len(index))]
        return _Order(_constant(order, device), _constant(back, device), sizes)

    def _once(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """What is found once; compiled code neither sees nor leaves anything here."""
        if torch.compiler.is_compiling():
            return find()
        if key not in self._kept:
            self._kept[key] = find()
        return self._kept[key]


class TensorRows(RowMap):
    """Rows that nothing but a tensor tells, so that compiled code serves all of its values.

    Every chain sees all rows, and each row keeps what its own chain gives. Where parts have a bank,
    nothing is computed in vain, see `flexheads.sites.banks`.

    Args:
        index: The chain of each row, ``(batch,)``.
        chains: How many chains there are.
    """

    def __init__(self, index: Tensor, chains: int) -> None:
        self.index, self.chains = index, chains

    def present(self, batch: int) -> Sequence[int]:
        return range(self.chains)

    def split(self, tensor: Tensor) -> list[Tensor]:
        return [tensor] * self.chains

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        whole = torch.stack(list(parts))
        batch = whole.shape[1]
        return whole[self.index.to(whole.device), torch.arange(batch, device=whole.device)]

    def chosen(self, batch: int, device: torch.device) -> Chosen:
        return Chosen(range(self.chains), None, device, self.index.to(device))


class RowsOfCall(RowMap):
    """The rows that the plan of the running call tells, for operations that serve any rows."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    @property
    def _rows(self) -> RowMap:
        rows: RowMap = self.runtime.current().rows
        return rows

    def present(self, batch: int) -> Sequence[int]:
        return self._rows.present(batch)

    def split(self, tensor: Tensor) -> list[Tensor]:
        return self._rows.split(tensor)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        return self._rows.merge(parts)

    def chosen(self, batch: int, device: torch.device) -> Chosen:
        return self._rows.chosen(batch, device)


def row_map(routing: Routing, runtime: Runtime) -> RowMap | None:
    """The rows of a plan's operations; None where all follow one chain.

    Args:
        routing: The routing of the plan.
        runtime: Knows the plan of the running call.
    """
    if routing.single:
        return None
    any_rows = routing.index is not None or routing.tasks is not None
    return RowsOfCall(runtime) if any_rows else KnownRows(routing)


def _numbers(rows: list[int] | slice, batch: int) -> Sequence[int]:
    return range(batch)[rows] if isinstance(rows, slice) else rows


def _constant(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers that outlive the call, also one in inference mode."""
    if torch.compiler.is_compiling():
        return torch.tensor(numbers, device=device)
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)
