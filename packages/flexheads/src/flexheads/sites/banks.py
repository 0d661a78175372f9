"""Banks: parts of one shape, each for some rows of a batch, as one batched product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from flexheads.sites.bank_calls import BanksOfPlan, Fresh, Given
from flexheads.sites.direct import quiet
from flexheads.sites.rows import Chosen, RowMap
from flexheads.sites.shelf import Weights

PartT = TypeVar("PartT", bound=nn.Module)


class Bank(ABC, Generic[PartT]):
    """Parts that differ in their numbers only, one for each chain, which act on rows of their own.

    It says what a row multiplies with. Where that comes from, it does not know: inference keeps it
    from call to call, and other calls stack it anew, so that gradients go where they belong; see
    `flexheads.sites.bank_calls`.

    Args:
        parts: The part of each chain; None for a chain that does nothing here.

    Attributes:
        site: What the site tells its parts of itself, if anything; see `chain_bank`.
        number: Which it is among the banks of a plan.
    """

    def __init__(self, parts: Sequence[PartT | None]) -> None:
        self.first = next(part for part in parts if part is not None)
        self.parts = tuple(parts)
        self.site: Any = None
        self.number = 0

    def __call__(self, given: Given, *args: Any) -> Any:
        """What the parts make of their rows; arguments and result are those of a part's forward.

        Args:
            given: What the rows multiply with.
            args: The arguments of a part's forward, for the whole batch.
        """
        weights, factor = given.of(self)
        return self.run(weights, factor, *args)

    @abstractmethod
    def run(self, weights: Weights, factor: Tensor | float, *args: Any) -> Any:
        """The same, by the weights of every row.

        Args:
            weights: Those that `weights` names: matrices as ``(batch, in, out)``, vectors as
                ``(batch, 1, out)``.
            factor: What `factor` names: one number, or ``(batch, 1, 1)``.
            args: The arguments of a part's forward, for the whole batch.
        """

    @abstractmethod
    def weights(self, part: PartT) -> Weights:
        """What the rows of a part multiply with: matrices ``(out, in)`` and vectors ``(out,)``."""

    def factor(self, part: PartT) -> float:
        """A number that its result is multiplied with."""
        return 1.0

    def folded(self, part: PartT) -> Weights:
        """The weights with the factor in them, for a factor of one; such are kept."""
        return self.weights(part)

    def idle(self, like: Weights) -> Weights:
        """The weights of a chain that does nothing here.

        Args:
            like: Those of one that does something.
        """
        return tuple(map(torch.zeros_like, like))

    def modules(self, part: PartT) -> Iterable[nn.Module]:
        """The modules of a part that are not called by themselves in a bank."""
        return (part,)

    def read(self, part: PartT) -> Iterable[nn.Module]:
        """Modules beside the part that its weights are computed from."""
        return ()

    @property
    def draws(self) -> bool:
        """Whether something is left to chance that a bank cannot do."""
        return False

    def at_hand(self, present: Iterable[int]) -> bool:
        """Whether weights can be used without calling modules: nothing hooks or offloads them."""
        parts = [part for part in map(self.parts.__getitem__, present) if part is not None]
        return all(quiet(module) for part in parts for module in self.modules(part))


class _Common:
    """A part that is the same for all chains, such as what a Stack has before its branches."""

    draws = False

    def __init__(self, part: Any) -> None:
        self.part = part

    def __call__(self, given: Given, *args: Any) -> Any:
        return self.part(*args)

    def at_hand(self, present: Iterable[int]) -> bool:
        return True


class ChainBank:
    """Whole chains of parts, all rows at once.

    Args:
        steps: What runs the first parts of all chains, the second ones, and so on.
        changed: The argument of a part that its result takes the place of.

    Attributes:
        together: The banks of the plan that this is one of; None until it is.
    """

    def __init__(self, steps: Sequence[Bank[Any] | _Common], changed: int) -> None:
        self.steps, self.changed = tuple(steps), changed
        self.together: BanksOfPlan | None = None

    @property
    def banks(self) -> list[Bank[Any]]:
        """The banks among the steps."""
        return [step for step in self.steps if isinstance(step, Bank)]

    def __call__(self, rows: RowMap, like: Tensor, *args: Any) -> Any | None:
        """The result of all chains; None where they have to run one by one.

        Args:
            rows: The rows of each chain.
            like: A tensor that tells batch and device.
            args: The arguments of a part's forward.
        """
        given = self._given(rows, like)
        if given is None:
            return None
        own = list(args)
        for step in self.steps:
            own[self.changed] = step(given, *own)
        return own[self.changed]

    def _given(self, rows: RowMap, like: Tensor) -> Given | None:
        """What the rows multiply with; None where parts have to run by themselves."""
        if any(step.draws for step in self.steps):
            return None
        if self.together is not None and not torch.compiler.is_compiling():
            found = self.together.of_call(rows, like)
            if found is not None:
                return None if found.loud and self._is_in(found.loud) else found.given
        chosen: Chosen = rows.chosen(like.shape[0], like.device)
        at_hand = all(step.at_hand(chosen.present) for step in self.steps)
        return Fresh(chosen) if at_hand else None

    def _is_in(self, numbers: frozenset[int]) -> bool:
        return any(bank.number in numbers for bank in self.banks)


def chain_bank(chains: Sequence[Sequence[Any]], changed: int, site: Any = None) -> ChainBank | None:
    """What runs chains of parts on rows of their own at once; None where nothing can.

    A part may have a method ``bank``, which is given the parts that stand at its place in each
    chain, None where there is none, and gives a `Bank` of them if they are of one shape.

    Args:
        chains: The parts of each chain.
        changed: The argument of a part that its result takes the place of.
        site: What banks are told of the site, see `Bank`.
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
        bank.site = site
        steps.append(bank)
    return ChainBank(steps, changed) if steps else None
