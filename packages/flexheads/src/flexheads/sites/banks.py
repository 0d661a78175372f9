"""Banks: parts of one shape, each for some rows of a batch, as one batched product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from flexheads.sites.direct import quiet
from flexheads.sites.rows import Chosen, RowMap

PartT = TypeVar("PartT", bound=nn.Module)


class Bank(ABC, Generic[PartT]):
    """Parts that differ in their numbers only, one for each chain, which act on rows of their own.

    What the parts have is stacked in every call, for the chains that have rows in it, and picked by
    row. So there is no copy of weights that could grow old or take up memory, and gradients go
    where they belong.

    Args:
        parts: The part of each chain; None for a chain that does nothing here.
    """

    def __init__(self, parts: Sequence[PartT | None]) -> None:
        self.first = next(part for part in parts if part is not None)
        self.acts = [part is not None for part in parts]
        # A chain that does nothing here borrows a part, whose effect is taken away again.
        self.parts = [self.first if part is None else part for part in parts]

    @abstractmethod
    def __call__(self, chosen: Chosen, *args: Any) -> Any:
        """What the parts make of their rows; arguments and result are those of a part's forward.

        Args:
            chosen: The chain of each row.
            args: The arguments of a part's forward, for the whole batch.
        """

    def modules(self, part: PartT) -> Iterable[nn.Module]:
        """The modules of a part that are not called by themselves in a bank."""
        return (part,)

    def at_hand(self, chosen: Chosen) -> bool:
        """Whether weights can be used without calling modules: nothing hooks or offloads them."""
        parts = [self.parts[number] for number in chosen.present]
        return all(quiet(module) for part in parts for module in self.modules(part))

    def stacked(
        self, value: Callable[[PartT], Tensor], chosen: Chosen, otherwise: float | None = None
    ) -> Tensor:
        """A value of each row's part: ``(batch, ...)``.

        Args:
            value: Gives it, of one shape for all parts.
            chosen: The chain of each row.
            otherwise: What stands in its place for chains that do nothing here; None is the value
                of a borrowed part.
        """
        each = [value(self.parts[number]) for number in chosen.present]
        if otherwise is not None:
            for place, number in enumerate(chosen.present):
                if not self.acts[number]:
                    each[place] = torch.full_like(each[place], otherwise)
        return chosen.by_row(torch.stack(each))

    def stacked_pairs(
        self, pair: Callable[[PartT], tuple[Tensor, Tensor]], chosen: Chosen
    ) -> tuple[Tensor, Tensor]:
        """Two values of each row's part, as `stacked` gives one."""
        ones, others = zip(*(pair(self.parts[n]) for n in chosen.present), strict=True)
        return chosen.by_row(torch.stack(ones)), chosen.by_row(torch.stack(others))

    def factors(
        self, factor: Callable[[PartT], float], chosen: Chosen, like: Tensor
    ) -> Tensor | float:
        """A number of each row's part, zero for chains that do nothing here: ``(batch, 1, 1)``.

        Args:
            factor: Gives it.
            chosen: The chain of each row.
            like: A tensor with the dtype and the device.
        """
        numbers = [factor(self.parts[n]) if self.acts[n] else 0.0 for n in chosen.present]
        if len(set(numbers)) == 1:
            return numbers[0]
        return chosen.by_row(like.new_tensor(numbers)).view(-1, 1, 1)


class _Common:
    """A part that is the same for all chains, such as what a Stack has before its branches."""

    def __init__(self, part: Any) -> None:
        self.part = part

    def __call__(self, chosen: Chosen, *args: Any) -> Any:
        return self.part(*args)

    def at_hand(self, chosen: Chosen) -> bool:
        return True


class ChainBank:
    """Whole chains of parts, all rows at once.

    Args:
        steps: What runs the first parts of all chains, the second ones, and so on.
        changed: The argument of a part that its result takes the place of.
    """

    def __init__(self, steps: Sequence[Bank[Any] | _Common], changed: int) -> None:
        self.steps, self.changed = tuple(steps), changed

    def __call__(self, rows: RowMap, like: Tensor, *args: Any) -> Any | None:
        """The result of all chains; None where they have to run one by one.

        Args:
            rows: The rows of each chain.
            like: A tensor that tells batch and device.
            args: The arguments of a part's forward.
        """
        chosen = rows.chosen(like.shape[0], like.device)
        if not all(step.at_hand(chosen) for step in self.steps):
            return None
        own = list(args)
        for step in self.steps:
            own[self.changed] = step(chosen, *own)
        return own[self.changed]


def chain_bank(chains: Sequence[Sequence[Any]], changed: int) -> ChainBank | None:
    """What runs chains of parts on rows of their own at once; None where nothing can.

    A part may have a method ``bank``, which is given the parts that stand at its place in each
    chain, None where there is none, and gives a `Bank` of them if they are of one shape.

    Args:
        chains: The parts of each chain.
        changed: The argument of a part that its result takes the place of.
    """
    steps: list[Bank[Any] | _Common] = []
    for parts in zip_longest(*chains):
        first = next(part for part in parts if part is not None)
        if all(part is first for part in parts):
            steps.append(_Common(first))
            continue
        make = getattr(first, "bank", None)
        bank = None if make is None else make(parts)
        if bank is None:
            return None
        steps.append(bank)
    return ChainBank(steps, changed) if steps else None
