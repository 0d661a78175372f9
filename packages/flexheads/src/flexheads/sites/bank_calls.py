"""What the banks of a plan are given in a call: weights that are kept, or stacked anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor

from flexheads.sites.columns import Column
from flexheads.sites.derived import hooked_everywhere, notes, wants_gradients, watched
from flexheads.sites.rows import Chosen, RowMap
from flexheads.sites.runtime import Runtime
from flexheads.sites.shelf import Shelf, Weights, ready, stacked

if TYPE_CHECKING:
    from flexheads.sites.banks import Bank, ChainBank


class Given(Protocol):
    """What the rows of a call multiply with."""

    def of(self, bank: Bank[Any]) -> tuple[Weights, Tensor | float]:
        """The weights and the factor of every row at one bank, see `Bank.run`."""


class Fresh:
    """Weights that are stacked where they are asked for, for the chains that have rows.

    Args:
        chosen: The chain of each row.
    """

    def __init__(self, chosen: Chosen) -> None:
        self.chosen = chosen

    def of(self, bank: Bank[Any]) -> tuple[Weights, Tensor | float]:
        """The weights and the factor of every row, in a stack that passes gradients on."""
        chosen, parts = self.chosen, [bank.parts[number] for number in self.chosen.present]
        # The first that acts lends its shapes and its factor to those that do not.
        first = next((part for part in parts if part is not None), bank.first)
        given = [None if part is None else bank.weights(part) for part in parts]
        like = next((own for own in given if own is not None), None) or bank.weights(first)
        each = [bank.idle(like) if own is None else own for own in given]
        weights = [chosen.by_row(stacked(values)) for values in zip(*each, strict=True)]
        factors = [bank.factor(first if part is None else part) for part in parts]
        factor: Tensor | float = factors[0]
        if len(set(factors)) > 1:
            factor = chosen.by_row(weights[0].new_tensor(factors)).view(-1, 1, 1)
        return tuple(ready(weight, 1) for weight in weights), factor


class Kept:
    """Weights that were picked for the rows of the call before, or out of kept stacks.

    Args:
        weights: Those of each bank.
    """

    def __init__(self, weights: Sequence[Weights]) -> None:
        self.weights = weights

    def of(self, bank: Bank[Any]) -> tuple[Weights, Tensor | float]:
        """The weights of every row; their factor is in them."""
        return self.weights[bank.number], 1.0


class Found(NamedTuple):
    """What was found out for the banks of a plan, once in a call.

    Attributes:
        batch: The rows of the tensors that it is for.
        device: Where they are.
        given: What the rows multiply with.
        loud: The numbers of banks whose parts have to run by themselves.
    """

    batch: int
    device: torch.device
    given: Given
    loud: frozenset[int]


class BanksOfPlan:
    """All banks of one plan, whose weights are looked at together, once in a call.

    Args:
        chains: What runs whole chains, by the address of the site.
        runtime: The model's runtime.
    """

    def __init__(self, chains: Iterable[tuple[str, ChainBank]], runtime: Runtime) -> None:
        self.runtime = runtime
        self.banks: list[Bank[Any]] = []
        places: list[tuple[str, type]] = []
        for address, chain in chains:
            chain.together = self
            for bank in chain.banks:
                bank.number = len(self.banks)
                self.banks.append(bank)
                places.append((address, type(bank)))
        self._places = tuple(places)
        self._columns: tuple[ref[Shelf], list[Column]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies find out by themselves what their adapters are like."""
        return {**self.__dict__, "_columns": None}

    def columns(self, shelf: Shelf) -> list[Column]:
        """The parts of each chain, as a shelf knows them."""
        known = self._columns
        if known is None or known[0]() is not shelf:
            every = zip(*(bank.parts for bank in self.banks), strict=True)
            columns = [shelf.column(self.banks, parts) for parts in every]
            known = self._columns = (ref(shelf), columns)
        return known[1]

    def of_call(self, rows: RowMap, like: Tensor) -> Found | None:
        """What holds in this call; None outside of any call.

        Args:
            rows: The rows of each chain.
            like: A tensor that tells batch and device.
        """
        noted = notes()
        if noted is None:
            return None
        found: Found | None = noted.found.get(self)
        if found is None or found.batch != like.shape[0] or found.device != like.device:
            found = noted.found[self] = self._look(rows.chosen(like.shape[0], like.device), like)
        return found

    def _look(self, chosen: Chosen, like: Tensor) -> Found:
        shelf = self.runtime.plans.shelf
        every = self.columns(shelf)
        columns = [every[number] for number in chosen.present]
        loud = frozenset[int]().union(*(column.loud() for column in columns))
        if hooked_everywhere():
            loud = frozenset(range(len(self.banks)))
        weights = None if loud else self._kept(shelf, chosen, columns)
        given = Fresh(chosen) if weights is None else Kept(weights)
        return Found(like.shape[0], like.device, given, loud)

    def _kept(
        self, shelf: Shelf, chosen: Chosen, columns: Sequence[Column]
    ) -> Sequence[Weights] | None:
        """Weights that outlive the call; None where nothing must be kept now."""
        if chosen.known is None or watched():
            return None
        wanted = torch.is_grad_enabled()
        if wanted and any(wants_gradients(column.tensors()) for column in columns):
            shelf.forget()  # optimizers may write in ways that leave no trace
            return None
        stacks = shelf.find(self._places, columns)
        if stacks is None:
            return None
        numbers = [stacks.numbers[column.parts] for column in columns]
        return stacks.picked(tuple(numbers[place] for place in chosen.known))


def look_at_banks_together(ops: Iterable[tuple[str, Any]], runtime: Runtime) -> None:
    """Has the weights of all banks of a plan looked at together.

    Args:
        ops: What sites do, by address.
        runtime: The model's runtime.
    """
    pairs = [(address, getattr(op, "bank", None)) for address, op in ops]
    chains = [(address, chain) for address, chain in pairs if chain is not None and chain.banks]
    if chains and not torch.compiler.is_compiling():  # what is traced runs each by itself
        BanksOfPlan(chains, runtime)
