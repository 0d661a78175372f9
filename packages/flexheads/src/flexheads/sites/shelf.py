"""Stacks of the weights of chains, kept from call to call for rows that inference sends there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from itertools import count
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from flexheads.sites.columns import Column, Look, first_values

if TYPE_CHECKING:
    from flexheads.sites.banks import Bank

KEPT = 1 << 30
"""Bytes that the stacks of one model take up at most."""

AT_ONCE = 128 << 20
"""Bytes up to which the weights of the rows of a batch are picked for all layers at once."""

Weights = tuple[Tensor, ...]
"""What the rows of a batch multiply with at one bank, see `flexheads.sites.banks.Bank.run`."""


class _Layout(NamedTuple):
    """Which values are stacked in one tensor: those of one shape, dtype and device.

    Attributes:
        kinds: The shape, dtype and device of each stack.
        places: For each bank, for each of its values: the stack, and the place in it.
    """

    kinds: tuple[Hashable, ...]
    places: tuple[tuple[tuple[int, int], ...], ...]


class Stacks:
    """The weights of some chains; never changed, so that threads can read it at any time.

    Attributes:
        looks: What each chain was when its weights were taken, in the order of the stacks.
        tensors: The stacks, ``(chains, values of that shape, ...)``.
    """

    def __init__(
        self, looks: dict[tuple[Any, ...], Look], layout: _Layout, tensors: Sequence[Tensor]
    ) -> None:
        self.looks, self.layout, self.tensors = looks, layout, tuple(tensors)
        self.numbers = {parts: number for number, parts in enumerate(looks)}
        self._last: tuple[tuple[int, ...], Sequence[Weights]] | None = None

    @property
    def nbytes(self) -> int:
        """The memory that the stacks take up."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def picked(self, rows: tuple[int, ...]) -> Sequence[Weights]:
        """What rows multiply with, for each bank.

        Args:
            rows: The number of the chain of each.
        """
        last = self._last
        if last is not None and last[0] == rows:
            return last[1]
        if self.nbytes // len(self.looks) * len(rows) > AT_ONCE:
            return _Later(self, rows)
        self._last = last = None  # so that there are never two
        with torch.inference_mode(False), torch.no_grad():
            every = [ready(each, 2).unbind(1) for each in map(_picker(rows), self.tensors)]
        picked = [tuple(every[n][at] for n, at in own) for own in self.layout.places]
        self._last = (rows, picked)
        return picked


class _Later(Sequence[Weights]):
    """What rows multiply with, picked where it is asked for."""

    def __init__(self, stacks: Stacks, rows: tuple[int, ...]) -> None:
        self.stacks, self.pick = stacks, _picker(rows)

    def __len__(self) -> int:
        return len(self.stacks.layout.places)

    def __getitem__(self, bank: Any) -> Any:
        own, tensors = self.stacks.layout.places[bank], self.stacks.tensors
        return tuple(ready(self.pick(tensors[n][:, at]), 1) for n, at in own)


class Shelf:
    """The stacks of one model, at most so many bytes of them.

    Chains of one kind, those that have parts of the same shapes at the same places, share a stack.
    One that is asked for first joins it; one that has changed since is taken anew; where memory
    runs out, those go that were not asked for the longest time. Nothing is changed in place.

    Args:
        limit: Bytes that are kept at most.
    """

    def __init__(self, limit: int = KEPT) -> None:
        self.limit = limit
        self._kinds: dict[Hashable, Stacks] = {}
        self._lock, self._clock = threading.Lock(), count()
        self._columns: WeakValueDictionary[Any, Column] = WeakValueDictionary()

    @property
    def nbytes(self) -> int:
        """The memory that all stacks take up."""
        return sum(stacks.nbytes for stacks in tuple(self._kinds.values()))

    def column(self, banks: Sequence[Bank[Any]], parts: tuple[Any, ...]) -> Column:
        """The column of these parts; one for all plans in which they stand together."""
        # What stands for no part is the business of the bank.
        key = (parts, tuple(map(type, banks)) if None in parts else ())
        found = self._columns.get(key)
        return self._columns.setdefault(key, Column(banks, parts)) if found is None else found

    def forget(self) -> None:
        """Drops all stacks."""
        self._kinds = {}

    def find(self, places: Hashable, columns: Sequence[Column]) -> Stacks | None:
        """Stacks in which these chains are, as they are now; None where they cannot be kept.

        Args:
            places: Where their parts stand, and of what kind these are.
            columns: The chains, of which parts at one place have the same shapes.
        """
        # A chain that does nothing at some places leaves it to another to tell the shapes.
        kind = (places, next(filter(None, map(Column.shapes, columns)), ()))
        stacks = self._kinds.get(kind)
        if stacks is not None:
            looks, now = stacks.looks, next(self._clock)
            for column in columns:
                look = looks.get(column.parts)
                if look is None or not look.holds():
                    break
                look.asked = now
            else:
                return stacks
        with self._lock:
            return self._renewed(kind, columns)

    def _renewed(self, kind: Hashable, columns: Sequence[Column]) -> Stacks | None:
        """Stacks with these chains, and as many others as there is room for."""
        columns = tuple({column.parts: column for column in columns}.values())  # each once
        old = self._kinds.get(kind)
        held = {} if old is None else old.looks
        missing = [c for c in columns if c.parts not in held or not held[c.parts].holds()]
        if old is not None and not missing:
            return old  # another thread was quicker
        new = _taken(missing)
        if new is None or not self._fit(new, columns):
            self._kinds.pop(kind, None)
            return None
        for look in new.looks.values():
            look.asked = next(self._clock)
        if old is not None and old.layout == new.layout:
            new = self._joined(old, new, columns)
        elif len(missing) < len(columns):
            new = _taken(columns)  # the others are of another dtype, or elsewhere
        if new is not None:
            self._keep(kind, new)
        return new

    def _fit(self, new: Stacks, columns: Sequence[Column]) -> bool:
        return new.nbytes // len(new.looks) * len(columns) <= self.limit

    def _joined(self, old: Stacks, new: Stacks, columns: Sequence[Column]) -> Stacks:
        """What was there, as far as there is room for it, and what is new."""
        wanted = {column.parts for column in columns}
        room = self.limit // (new.nbytes // len(new.looks)) - len(wanted)
        others = [parts for parts in old.looks if parts not in wanted]
        others.sort(key=lambda parts: old.looks[parts].asked)
        stay = [*others[max(0, len(others) - room) :], *(wanted - new.looks.keys())]
        if not stay:
            return new
        pick = _picker(tuple(old.numbers[parts] for parts in stay))
        with torch.inference_mode(False), torch.no_grad():
            pairs = zip(old.tensors, new.tensors, strict=True)
            tensors = [torch.cat([pick(mine), own]) for mine, own in pairs]
        return Stacks({parts: old.looks[parts] for parts in stay} | new.looks, old.layout, tensors)

    def _keep(self, kind: Hashable, stacks: Stacks) -> None:
        self._kinds[kind] = stacks
        others = [other for other in self._kinds if other != kind]
        others.sort(key=lambda other: max(map(_asked, self._kinds[other].looks.values())))
        while others and self.nbytes > self.limit:
            self._kinds.pop(others.pop(0), None)


_asked = attrgetter("asked")


def ready(weights: Tensor, leading: int) -> Tensor:
    """Weights as products take them: matrices transposed, and vectors as rows of one position.

    Args:
        weights: ``(..., out, in)`` or ``(..., out)``.
        leading: How many dimensions number them.
    """
    matrices = weights.dim() == leading + 2
    return weights.transpose(-1, -2) if matrices else weights.unsqueeze(leading)


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """Weights of one shape as one tensor, ``(weights, ...)``: without a view of each."""
    return torch.cat(list(weights)).view(len(weights), *weights[0].shape)


def _picker(rows: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """What picks rows of a stack, by numbers that go to each device once."""
    indices: dict[torch.device, Tensor] = {}

    def pick(stack: Tensor) -> Tensor:
        index = indices.get(stack.device)
        if index is None:
            with torch.inference_mode(False):
                index = indices[stack.device] = torch.tensor(rows, device=stack.device)
        return stack.index_select(0, index)

    return pick


def _taken(columns: Sequence[Column]) -> Stacks | None:
    """Stacks of the weights of chains as they are now; None where that cannot be."""
    # What is read first is what a change during the computation is noticed by.
    looks = {column.parts: column.look() for column in columns}
    if not all(looks.values()):
        return None
    with torch.inference_mode(False), torch.no_grad():
        like = first_values(columns)
        values = [column.values(like) for column in columns]
        layout = _layout(values[0])
        if any(_layout(own) != layout for own in values[1:]):
            return None
        members: list[list[tuple[int, int]]] = [[] for _ in layout.kinds]
        for bank, own in enumerate(layout.places):
            for value, (kind, _) in enumerate(own):
                members[kind].append((bank, value))
        tensors = []
        for each in members:
            whole = stacked([own[bank][value] for own in values for bank, value in each])
            tensors.append(whole.view(len(columns), len(each), *whole.shape[1:]))
    return Stacks(looks, layout, tensors)  # type: ignore[arg-type]


def _layout(values: Sequence[Weights]) -> _Layout:
    """How the values of one chain lie in stacks."""
    kinds: dict[Hashable, int] = {}
    sizes: list[int] = []
    places = []
    for own in values:
        at = []
        for value in own:
            kind = kinds.setdefault((value.shape, value.dtype, value.device), len(kinds))
            if kind == len(sizes):
                sizes.append(0)
            at.append((kind, sizes[kind]))
            sizes[kind] += 1
        places.append(tuple(at))
    return _Layout(tuple(kinds), tuple(places))
