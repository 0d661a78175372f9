"""What banks stack of one chain, and whether it is as it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexheads.sites.derived import Snapshot, has_plain_weights, is_plain, wants_gradients
from flexheads.sites.direct import quiet

if TYPE_CHECKING:
    from flexheads.sites.banks import Bank


Shapes = tuple[tuple[torch.Size, ...], ...] | None


class Column:
    """The parts of one chain at all banks of a plan.

    Attributes:
        parts: The part at each bank; None where the chain does nothing.
    """

    def __init__(self, banks: Sequence[Bank[Any]], parts: Sequence[nn.Module | None]) -> None:
        self.banks, self.parts = banks, tuple(parts)
        # Modules that are not called by themselves, each with the number of its bank.
        self._silent = [
            (number, module)
            for number, part in enumerate(self.parts)
            if part is not None
            for module in banks[number].modules(part)
        ]
        self._owned = [module.__dict__ for _, module in self._silent]
        self._shapes: Shapes = None
        self._holders: list[dict[str, Any]] | None = None
        self._seen: tuple[int, list[int], frozenset[int]] = (-1, [], frozenset())

    def loud(self) -> frozenset[int]:
        """The numbers of banks that must not run, because somebody would miss a module's call."""
        hooks, sizes, loud = self._seen
        # A hook that was registered has a new number, and what replaces a forward is an entry more.
        now = list(map(len, self._owned))
        if loud or hooks != RemovableHandle.next_id or sizes != now:
            hooks = RemovableHandle.next_id
            loud = frozenset(number for number, module in self._silent if not quiet(module))
            self._seen = (hooks, now, loud)
        return loud

    def tensors(self) -> list[Tensor]:
        """All tensors that this is computed from."""
        if self._holders is None:
            self._holders = self._find_holders()
        return [v for v in _values(self._holders) if isinstance(v, Tensor)]

    def shapes(self) -> Shapes:
        """The shapes of all weights, bank by bank; None where the chain does nothing at one."""
        if self._shapes is None and None not in self.parts:
            with torch.no_grad():
                pairs = zip(self.banks, self.parts, strict=True)
                every = [bank.weights(part) for bank, part in pairs]
            self._shapes = tuple(tuple(own.shape for own in each) for each in every)
        return self._shapes

    def look(self) -> Look | None:
        """What all of it is now; None where nothing may be kept, or changes would go unnoticed."""
        self._holders = self._find_holders()
        acting = [part for part in self.parts if part is not None]
        tensors = self.tensors()
        usual = all(has_plain_weights(module) for part in acting for module in part.modules())
        if not usual or not all(map(is_plain, tensors)) or wants_gradients(tensors):
            return None
        return Look(self._holders, [part.__dict__ for part in acting])

    def _find_holders(self) -> list[dict[str, Any]]:
        """Where modules hold the tensors that this is computed from, and the modules with such."""
        modules: dict[nn.Module, None] = {}
        for bank, part in zip(self.banks, self.parts, strict=True):
            if part is not None:
                modules.update(dict.fromkeys(part.modules()))
                modules.update(dict.fromkeys(bank.read(part)))
        return [held for module in modules for held in _holders(module)]

    def values(self, like: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """For each bank what a row of this chain multiplies with.

        Args:
            like: The same of a chain that does something at each.
        """
        each = zip(self.banks, self.parts, like, strict=True)
        return [bank.idle(own) if p is None else bank.folded(p) for bank, p, own in each]


def first_values(columns: Sequence[Column]) -> list[tuple[Tensor, ...]]:
    """For each bank the weights of the first chain that does something there."""
    banks = columns[0].banks
    every = zip(*(column.parts for column in columns), strict=True)
    firsts = [next((part for part in parts if part is not None), None) for parts in every]
    pairs = zip(banks, firsts, strict=True)
    return [bank.folded(bank.first if part is None else part) for bank, part in pairs]


class Look:
    """The weights of a column as they are now, to tell later whether one of them has changed.

    Many small modules are looked at in every call, so this goes through no module by itself.

    Args:
        holders: The dictionaries with the tensors.
        parts: Those with the attributes of parts.

    Attributes:
        tensors: The tensors.
        asked: When it was asked for the last time; counted, not in seconds.
    """

    def __init__(self, holders: list[dict[str, Any]], parts: list[dict[str, Any]]) -> None:
        self._holders = holders
        self._scaled = [own for own in parts if "scaling" in own]
        self._held, self._factors = _values(holders), self._scalings()
        self.tensors = [value for value in self._held if isinstance(value, Tensor)]
        self._snapshot = Snapshot(self.tensors)
        self.asked = 0

    def holds(self) -> bool:
        """Whether all of it is as it was; writing to the ``.data`` of a weight goes unnoticed."""
        now = _values(self._holders)
        return (
            len(now) == len(self._held)
            and all(map(is_, now, self._held))
            and self._factors == self._scalings()
            and self._snapshot.holds(self.tensors)
        )

    def _scalings(self) -> list[Any]:
        return [own.get("scaling") for own in self._scaled]


def _values(holders: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, holders)))


def _holders(module: nn.Module) -> Iterable[dict[str, Any]]:
    """The dictionaries of a module that lead to tensors; a dropout has none."""
    if module._parameters:
        yield module._parameters
    if module._buffers:
        yield module._buffers
    if any(_has_tensors(child) for child in module._modules.values() if child is not None):
        yield module._modules


def _has_tensors(module: nn.Module) -> bool:
    return next(chain(module.parameters(), module.buffers()), None) is not None
