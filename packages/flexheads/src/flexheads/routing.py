"""From a composition to the chains of adapters that rows of a batch follow; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexheads.composition import (
    Average,
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
        """Whether all rows follow one chain."""
        return len(self.chains) == 1 and self.index is None and self.tasks is None

    def assigned(self, index: Sequence[int]) -> Routing:
        """The same chains, with the chain of each row."""
        return replace(self, index=tuple(index), tasks=None)

    def rows(self, batch: int) -> tuple[list[int] | slice, ...]:
        """The rows of each chain in a batch of `batch` rows (already repeated).

        Raises:
            CompositionError: If the batch does not have the rows that the setup names.
        """
        if self.index is not None:
            if batch != len(self.index):
                raise CompositionError(
                    f"Rows names {len(self.index)} rows, but the batch has {batch}."
                )
            return tuple(
                [row for row, chain in enumerate(self.index) if chain == number]
                for number in range(len(self.chains))
            )
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

    Raises:
        CompositionError: Where a block stands in a place in which it has no meaning.
    """
    if setup is None:
        return Routing()
    if isinstance(setup, Rows):
        return _route_rows(setup)
    return _route(setup)


def _route_rows(setup: Rows) -> Routing:
    """The chains are in an order of their own, so that other rows with the same ones are alike."""
    rows = [_chain(child, setup) for child in setup]
    chains = sorted(dict.fromkeys(rows), key=_chain_name)
    numbers = {chain: number for number, chain in enumerate(chains)}
    return Routing(tuple(chains), index=tuple(numbers[chain] for chain in rows))


def _chain_name(chain: Chain) -> str:
    return "/".join(map(step_name, chain))


def step_name(step: Step) -> str:
    """What a head for this step would be called: an adapter's name, or a block's."""
    if isinstance(step, str):
        return step
    return step.name if isinstance(step, Fuse) else ",".join(step.names())


def chain_of(child: Child) -> Chain:
    """The chain that a branch inside a block stands for."""
    return _chain(child, Stack(""))


def _chain(child: Child, inside: Block) -> Chain:
    if child is None:
        return ()
    if isinstance(child, Stack):
        return sum((_chain(c, child) for c in child), ())
    if isinstance(child, str):
        return (child,)
    if isinstance(child, (Fuse, Split, Average)):
        _check_inside(child)
        return (child,)
    raise CompositionError(
        f"{child!r} cannot stand inside {inside!r}; a name, a Stack, or a block that keeps the "
        "rows of the batch can."
    )


def _check_inside(block: Block) -> None:
    """Refuses what has no meaning inside a block that keeps the rows."""
    if isinstance(block, Fuse):
        block.members()
    for child in block:
        _chain(child, block)


def _route(child: Child) -> Routing:
    if isinstance(child, Stack):
        return _route_stack(child)
    if isinstance(child, Parallel):
        branches = [_route(c) for c in child]
        if (
            any(b.repeat > 1 or b.tasks is not None for b in branches)
            or len({b.sizes is None for b in branches}) > 1
        ):
            raise CompositionError(
                f"{child!r}: a branch of Parallel is a name, a Stack, or each a BatchSplit."
            )
        sizes = None if branches[0].sizes is None else sum((b.sizes or () for b in branches), ())
        return Routing(sum((b.chains for b in branches), ()), len(branches), sizes)
    if isinstance(child, BatchSplit):
        return _route_batch_split(child)
    if isinstance(child, MultiTask):
        chains: dict[Chain, int] = {}
        tasks = tuple(chains.setdefault(_chain(c, child), len(chains)) for c in child)
        return Routing(tuple(chains), tasks=tasks)
    if isinstance(child, Rows):
        raise CompositionError(f"{child!r} cannot stand inside another block.")
    return Routing((chain_of(child),))


def _route_stack(stack: Stack) -> Routing:
    parts = [_route(child) for child in stack]
    several = [part for part in parts if not part.single]
    if len(several) > 1:
        raise CompositionError(f"{stack!r}: a Stack can hold one block that splits rows, not more.")
    shape = several[0] if several else parts[0]
    chains = tuple(
        sum((part.chains[number if part is shape else 0] for part in parts), ())
        for number in range(len(shape.chains))
    )
    return replace(shape, chains=chains)


def _route_batch_split(block: BatchSplit) -> Routing:
    chains: list[Chain] = []
    sizes: list[int] = []
    for child, size in zip(block, block.batch_sizes, strict=True):
        part = _route(child)
        if part.repeat > 1 or part.tasks is not None:
            kind = "Parallel" if part.repeat > 1 else "MultiTask"
            raise CompositionError(f"{block!r}: {kind} cannot stand inside BatchSplit.")
        inner = part.sizes or (size,)
        if sum(inner) != size:
            raise CompositionError(f"{block!r}: {child!r} shares out {sum(inner)} of {size} rows.")
        chains += part.chains
        sizes += inner
    return Routing(tuple(chains), sizes=tuple(sizes))
