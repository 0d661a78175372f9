"""From a composition to the chains of adapters that rows of a batch follow; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from flexheads.composition import (
    BatchSplit,
    Block,
    Child,
    Fuse,
    MultiTask,
    Parallel,
    Rows,
    Split,
    Stack,
)
from flexheads.errors import CompositionError

Step = str | Block
"""One step of a chain: an adapter, or a block that keeps the rows (Fuse, Split, Average)."""

Chain = tuple[Step, ...]


@dataclass(frozen=True)
class Routing:
    """Which rows of a batch follow which chain of adapters.

    Attributes:
        chains: The distinct ways through the model, each a sequence of steps.
        repeat: How many times the rows of the input are repeated (by `Parallel`).
        sizes: Consecutive rows per chain; None where the rows are shared out equally.
        index: For each row the chain that it follows (from `Rows`), instead of `sizes`.
        tasks: For each task its chain (from `MultiTask`), where only a call tells the rows.
    """

    chains: tuple[Chain, ...] = ((),)
    repeat: int = 1
    sizes: tuple[int, ...] | None = None
    index: tuple[int, ...] | None = None
    tasks: tuple[int, ...] | None = None

    @property
    def single(self) -> bool:
        """Whether all rows follow one chain, however many there are."""
        told = (self.index, self.sizes, self.tasks)
        return len(self.chains) == 1 and all(rows is None for rows in told)

    def assigned(self, index: Sequence[int]) -> Routing:
        """The same chains, with the chain of each row."""
        return replace(self, index=tuple(index), tasks=None)

    def among(self, chains: tuple[Chain, ...]) -> Routing:
        """The same rows, with the numbers of their chains in a list that has others too."""
        if self.chains == chains or self.index is None:
            return self
        place = {chain: number for number, chain in enumerate(chains)}
        numbers = [place[chain] for chain in self.chains]
        return replace(self, chains=chains, index=tuple(numbers[n] for n in self.index))

    def repeated(self, times: int) -> Routing:
        """The same for a batch in which each row stands so many times, one behind the other."""
        sizes = None if self.sizes is None else tuple(size * times for size in self.sizes)
        index = self.index and tuple(chain for chain in self.index for _ in range(times))
        return replace(self, sizes=sizes, index=index, repeat=1)

    def rows(self, batch: int) -> tuple[list[int] | slice, ...]:
        """The rows of each chain in a batch of `batch` rows (already repeated).

        Raises:
            CompositionError: If the batch does not have the rows that the setup names.
        """
        if self.index is not None:
            if batch != len(self.index):
                named, given = len(self.index) // self.repeat, batch // self.repeat
                raise CompositionError(f"Rows names {named} rows, but the batch has {given}.")
            own: tuple[list[int], ...] = tuple([] for _ in self.chains)
            for row, chain in enumerate(self.index):
                own[chain].append(row)
            return own
        if self.tasks is not None:
            raise CompositionError("The rows of MultiTask are only known in a call with task_ids.")
        sizes = self.sizes or (batch // len(self.chains),) * len(self.chains)
        if sum(sizes) != batch:
            raise CompositionError(
                f"The setup shares out {sum(sizes)} rows as {list(sizes)}, but the batch "
                f"has {batch}."
            )
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def route(setup: Block | None) -> Routing:
    """Resolves a composition into the chains that rows follow.

    One rule says what any nesting means: the chain of a row is the setup in which each BatchSplit,
    Rows and MultiTask is replaced by the branch that has this row, and each Parallel by the branch
    of this copy of the batch.

    Raises:
        CompositionError: Where a block stands in a place in which it has no meaning; it names the
            place, such as ``Stack[1] > Parallel[0]``.
    """
    if setup is None:
        return Routing()
    if isinstance(setup, Stack) and all(isinstance(child, str) for child in setup):
        return Routing((chain_of(setup),))  # as below, but quicker
    if any(isinstance(block, MultiTask) for block in setup.blocks()):
        return _route_tasks(setup)
    if isinstance(setup, Rows) and not any(isinstance(child, Block) for child in setup):
        return _of_names([chain_of(child) for child in setup])
    _positions(setup, "")
    copies, rows = _ways(setup, "")
    groups = [group for copy in copies for group in copy]
    chains = tuple(group.chain for group in groups)
    if rows is None:
        return Routing(chains, len(copies))
    numbered = [
        [number * rows + row for row in (range(rows) if group.rows is None else group.rows)]
        for number, copy in enumerate(copies)
        for group in copy
    ]
    order = [row for own in numbered for row in own]
    if order == sorted(order) and not any(isinstance(block, Rows) for block in setup.blocks()):
        return Routing(chains, len(copies), sizes=tuple(len(own) for own in numbered))
    chain_of_row = {row: chain for chain, own in enumerate(numbered) for row in own}
    index = tuple(chain_of_row[row] for row in range(len(copies) * rows))
    return _in_order(Routing(chains, len(copies), index=index))


def _of_names(rows: Sequence[Chain]) -> Routing:
    """Rows that name one adapter each, or none, as services do: what follows, but quicker."""
    chains: dict[Chain, int] = {}
    index = tuple(chains.setdefault(chain, len(chains)) for chain in rows)
    return _in_order(Routing(tuple(chains), index=index))


def _in_order(routing: Routing) -> Routing:
    """Chains in an order of their own, so that other rows with the same chains are alike."""
    numbers = range(len(routing.chains))
    order = sorted(numbers, key=lambda number: "/".join(map(step_name, routing.chains[number])))
    place = {number: at for at, number in enumerate(order)}
    chains = tuple(routing.chains[number] for number in order)
    return replace(routing, chains=chains, index=tuple(place[n] for n in routing.index or ()))


def step_name(step: Step) -> str:
    """What a head for this step would be called: an adapter's name, or a block's."""
    if isinstance(step, str):
        return step
    return step.name if isinstance(step, Fuse) else ",".join(step.names())


def chain_of(child: Child) -> Chain:
    """The chain that a branch of a step stands for; `route` has left no block that splits rows."""
    if child is None:
        return ()
    if isinstance(child, Stack):
        return sum((chain_of(own) for own in child), ())
    return (child,)


# --- which rows follow which chain ----------------------------------------------------------------


class _Group(NamedTuple):
    """Rows that follow one chain."""

    chain: Chain
    rows: tuple[int, ...] | None
    """Their numbers in the batch, or in the part of it that a branch gets; None is all."""


class _Ways(NamedTuple):
    """What a part of a setup says of the rows that it gets."""

    copies: tuple[tuple[_Group, ...], ...]
    """For each copy of the rows the groups that it falls into."""
    rows: int | None
    """How many rows it is for; None where that does not matter."""


def _ways(child: Child, place: str) -> _Ways:
    """The ways through a part of a setup.

    Args:
        child: The part.
        place: Where it stands, for messages.
    """
    if not isinstance(child, Block):
        return _Ways(((_Group(chain_of(child), None),),), None)
    places = _places(child, place)
    parts = [_ways(own, at) for own, at in zip(child, places, strict=True)]
    if isinstance(child, Parallel):
        copies = tuple(copy for part in parts for copy in part.copies)
        return _Ways(copies, _common_rows(parts, places))
    if isinstance(child, BatchSplit):
        return _shared_out(child, parts, places, child.batch_sizes)
    if isinstance(child, Rows):
        found = _shared_out(child, parts, places, (1,) * len(parts))
        return found._replace(copies=tuple(_by_chain(copy) for copy in found.copies))
    if isinstance(child, Stack):
        return _met(parts, places, lambda chains: sum(chains, ()))
    return _met(parts, places, lambda chains: (child.with_children(map(_child, chains)),))


def _child(chain: Chain) -> Child:
    """A chain as the branch of a block."""
    if len(chain) < 2:
        return chain[0] if chain else None
    return Stack(*chain)


def _shared_out(
    block: Block, parts: Sequence[_Ways], places: Sequence[str], sizes: Sequence[int]
) -> _Ways:
    """Consecutive rows to consecutive branches."""
    for part, size, place in zip(parts, sizes, places, strict=True):
        if part.rows not in (None, size):
            raise CompositionError(
                f"{place}: what stands here is for {part.rows} rows, but {_rows(size)} here."
            )
    counts = [len(part.copies) for part in parts]
    if len(set(counts)) > 1:
        other = next(n for n, count in enumerate(counts) if count != counts[0])
        raise CompositionError(
            f"{places[other]}: rows are repeated {counts[other]} times here, but {counts[0]} times "
            f"at {places[0]}. All branches of a {type(block).__name__} repeat their rows equally "
            "often; or put the Parallel around it, with a branch for each copy of the batch."
        )
    starts = [end - size for end, size in zip(accumulate(sizes), sizes, strict=True)]
    copies = tuple(
        tuple(
            _Group(group.chain, _moved(group.rows, start, size))
            for part, start, size in zip(parts, starts, sizes, strict=True)
            for group in part.copies[number]
        )
        for number in range(counts[0])
    )
    return _Ways(copies, sum(sizes))


def _rows(count: int) -> str:
    return "one row goes" if count == 1 else f"{count} rows go"


def _moved(rows: tuple[int, ...] | None, start: int, size: int) -> tuple[int, ...]:
    return tuple(start + row for row in (range(size) if rows is None else rows))


def _by_chain(groups: Sequence[_Group]) -> tuple[_Group, ...]:
    """Rows that are named one by one: those of one chain are one group."""
    rows: dict[Chain, tuple[int, ...]] = {}
    for chain, own in groups:
        rows[chain] = rows.get(chain, ()) + (own or ())
    return tuple(_Group(chain, own) for chain, own in rows.items())


def _met(
    parts: Sequence[_Ways], places: Sequence[str], join: Callable[[tuple[Chain, ...]], Chain]
) -> _Ways:
    """Parts that act on the same rows, cut wherever one of them is.

    Args:
        parts: The parts.
        places: Where they stand.
        join: Makes one chain of one for each part.
    """
    counts = [len(part.copies) for part in parts]
    several = [number for number, count in enumerate(counts) if count > 1]
    for number in several:
        if counts[number] != counts[several[0]]:
            raise CompositionError(
                f"{places[number]}: Parallel repeats the batch {counts[number]} times here, but "
                f"{counts[several[0]]} times at {places[several[0]]}. Side by side they belong to "
                "each other branch by branch, so they need the same number of branches."
            )
    copies = tuple(
        _cut_everywhere([part.copies[number % len(part.copies)] for part in parts], join)
        for number in range(max(counts))
    )
    return _Ways(copies, _common_rows(parts, places))


def _cut_everywhere(
    parts: Sequence[Sequence[_Group]], join: Callable[[tuple[Chain, ...]], Chain]
) -> tuple[_Group, ...]:
    met: list[tuple[tuple[Chain, ...], tuple[int, ...] | None]] = [((), None)]
    for groups in parts:
        pairs = [(chains, rows, group) for chains, rows in met for group in groups]
        met = [
            ((*chains, group.chain), _both(rows, group.rows))
            for chains, rows, group in pairs
            if rows is None or group.rows is None or set(rows) & set(group.rows)
        ]
    return tuple(_Group(join(chains), rows) for chains, rows in met)


def _both(one: tuple[int, ...] | None, other: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if one is None or other is None:
        return other if one is None else one
    among = set(other)
    return tuple(row for row in one if row in among)


def _common_rows(parts: Sequence[_Ways], places: Sequence[str]) -> int | None:
    """The number of rows that parts beside each other are for."""
    return _common([part.rows for part in parts], places, "rows of the batch")


# --- rows that a call tells ---------------------------------------------------------------------


def _route_tasks(setup: Block) -> Routing:
    """The chain of a task is the setup in which each MultiTask is replaced by its branch."""
    blocks = [block for block in setup.blocks() if isinstance(block, MultiTask)]
    counts = {len(block) for block in blocks}
    if len(counts) > 1:
        raise CompositionError(
            f"{setup!r}: its MultiTask blocks have {sorted(counts)} tasks; the numbers in task_ids "
            "are for all of them, so they need as many."
        )
    chains: dict[Chain, int] = {}
    tasks = []
    for task in range(len(blocks[0])):
        way = _of_task(setup, task)
        routing = route(way if isinstance(way, Block) or way is None else Stack(way))
        if not routing.single:
            raise CompositionError(
                f"{setup!r}: MultiTask sends each row to its branch, so it goes together with no "
                "other block that shares out or repeats rows."
            )
        tasks.append(chains.setdefault(routing.chains[0], len(chains)))
    return Routing(tuple(chains), tasks=tuple(tasks))


def _of_task(child: Child, task: int) -> Child:
    """A part of a setup, for the rows of one task."""
    if isinstance(child, MultiTask):
        return _of_task(child[task], task)
    if not isinstance(child, Block):
        return child
    children = [_of_task(own, task) for own in child]
    if isinstance(child, Stack):
        left = [own for own in children if own is not None]
        return Stack(*left) if left else None
    return child.with_children(children)


# --- places and numbers ---------------------------------------------------------------------------


def _places(block: Block, place: str) -> list[str]:
    """Where the children of a block stand."""
    own = f"{place} > {type(block).__name__}" if place else type(block).__name__
    return [f"{own}[{number}]" for number in range(len(block))]


def _common(counts: Sequence[int | None], places: Sequence[str], what: str) -> int | None:
    """The one number that all say who say any.

    Raises:
        CompositionError: If they say different ones.
    """
    saying = [number for number, count in enumerate(counts) if count is not None]
    for number in saying:
        if counts[number] != counts[saying[0]]:
            raise CompositionError(
                f"{places[number]} shares out {counts[number]} {what}, but {places[saying[0]]} "
                f"shares out {counts[saying[0]]}; here they have to be as many."
            )
    return counts[saying[0]] if saying else None


def _positions(child: Child, place: str) -> int | None:
    """How many positions of the sequence a part of a setup shares out; None where it does not.

    Raises:
        CompositionError: If two places of one sequence contradict each other.
    """
    if not isinstance(child, Block):
        return None
    places = _places(child, place)
    counts = [_positions(own, at) for own, at in zip(child, places, strict=True)]
    if not isinstance(child, Split):
        return _common(counts, places, "positions")
    for count, size, at in zip(counts, child.splits, places, strict=True):
        if count not in (None, size):
            raise CompositionError(
                f"{at}: what stands here shares out {count} positions, but {size} come here."
            )
    return sum(child.splits)
