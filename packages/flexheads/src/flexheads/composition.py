"""Composition blocks: how several named adapters act together, as hashable values without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Union

from flexheads.errors import CompositionError

Child = Union[str, "Block", None]
Setup = Union[str, "Block", Sequence["Setup"], None]
"""What users write for a setup: a name, a block, a list (a Stack), or None for no adapter."""


class Block:
    """A composition of adapters: immutable, compared and hashed by its content."""

    __slots__ = ("children",)
    children: tuple[Child, ...]

    def __init__(self, *children: Setup) -> None:
        if not children:
            raise CompositionError(f"{type(self).__name__} needs at least one adapter.")
        object.__setattr__(self, "children", tuple(self._child(child) for child in children))

    def _child(self, child: Setup) -> Child:
        if isinstance(child, (Block, str)):
            return child
        if isinstance(child, (list, tuple)):
            return Stack(*child)
        raise CompositionError(
            f"{type(self).__name__} takes adapter names and blocks, not {child!r}."
        )

    def __setattr__(self, key: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable.")

    def _state(self) -> tuple[object, ...]:
        return (self.children,)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._state() == other._state()

    def __hash__(self) -> int:
        return hash((type(self), self._state()))

    def __iter__(self) -> Iterator[Child]:
        return iter(self.children)

    def __len__(self) -> int:
        return len(self.children)

    def __getitem__(self, index: int) -> Child:
        return self.children[index]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.children))})"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self.children

    def names(self) -> tuple[str, ...]:
        """Every adapter name inside, in order, without repetition."""
        found: dict[str, None] = {}
        for child in self.children:
            if isinstance(child, Block):
                found.update(dict.fromkeys(child.names()))
            elif child is not None:
                found[child] = None
        return tuple(found)


class Stack(Block):
    """Adapters one after the other: ``Stack("language", "task")``."""


class Parallel(Block):
    """Every row of the batch goes through each branch; the outputs follow one another."""


class BatchSplit(Block):
    """Consecutive rows of the batch go to consecutive branches.

    Args:
        children: The branches.
        batch_sizes: Rows per branch: one number for all, or one for each.
    """

    __slots__ = ("batch_sizes",)
    batch_sizes: tuple[int, ...]

    def __init__(self, *children: Setup, batch_sizes: int | Sequence[int]) -> None:
        super().__init__(*children)
        sizes = [batch_sizes] * len(children) if isinstance(batch_sizes, int) else batch_sizes
        if len(sizes) != len(children) or any(size < 0 for size in sizes):
            raise CompositionError(
                f"BatchSplit has {len(children)} branches but batch_sizes={batch_sizes!r}; "
                "give one number, or one for each branch."
            )
        object.__setattr__(self, "batch_sizes", tuple(sizes))

    def _state(self) -> tuple[object, ...]:
        return self.children, self.batch_sizes

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, batch_sizes={list(self.batch_sizes)})"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_batch_split, (self.children, self.batch_sizes)


class Rows(Block):
    """Each row of the batch goes its own way: ``Rows(["a", None, "b"])``; None is the bare model.

    Args:
        rows: For each row an adapter name, a Stack, or None.
    """

    __slots__ = ()

    def __init__(self, rows: Iterable[Setup]) -> None:
        super().__init__(*rows)

    def _child(self, child: Setup) -> Child:
        return None if child is None else super()._child(child)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (list(self.children),)


def _rebuild_batch_split(children: tuple[Child, ...], sizes: tuple[int, ...]) -> BatchSplit:
    return BatchSplit(*children, batch_sizes=sizes)


def parse_composition(setup: Setup) -> Block | None:
    """Turns what users write into a block.

    Args:
        setup: A name, a block, a list of names (a Stack), or None or an empty list for no adapter.

    Returns:
        The block, or None for no adapter.

    Raises:
        CompositionError: If the value is nothing of that kind.
    """
    if setup is None or (isinstance(setup, (list, tuple)) and not setup):
        return None
    if isinstance(setup, Block):
        return setup
    if isinstance(setup, str):
        return Stack(setup)
    if isinstance(setup, (list, tuple)):
        if any(isinstance(child, (list, tuple)) for child in setup):
            raise CompositionError(
                f"{setup!r} nests a list in a list. Write the block that you mean, for example "
                'Parallel("a", "b") or Stack("a", "b").'
            )
        return Stack(*setup)
    raise CompositionError(f"A setup is a name, a list of names or a block, not {setup!r}.")


@dataclass(frozen=True)
class Routing:
    """Which rows of a batch follow which chain of adapters.

    Attributes:
        chains: The distinct ways through the model, each a sequence of adapter names.
        repeat: How many times the rows of the input are repeated (by `Parallel`).
        sizes: Consecutive rows per chain; None where the rows are shared out equally.
        index: For each row the chain that it follows (from `Rows`), instead of `sizes`.
    """

    chains: tuple[tuple[str, ...], ...] = ((),)
    repeat: int = 1
    sizes: tuple[int, ...] | None = None
    index: tuple[int, ...] | None = None

    @property
    def single(self) -> bool:
        """Whether all rows follow one chain."""
        return len(self.chains) == 1 and self.index is None

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
        chains: dict[tuple[str, ...], int] = {}
        index = tuple(chains.setdefault(_chain(child, setup), len(chains)) for child in setup)
        return Routing(tuple(chains), index=index)
    return _route(setup)


def _chain(child: Child, inside: Block) -> tuple[str, ...]:
    if child is None:
        return ()
    if isinstance(child, str):
        return (child,)
    if isinstance(child, Stack):
        return sum((_chain(c, child) for c in child), ())
    raise CompositionError(f"{child!r} cannot stand inside {inside!r}; a name or a Stack can.")


def _route(child: Child) -> Routing:
    if isinstance(child, Stack):
        return _route_stack(child)
    if isinstance(child, Parallel):
        branches = [_route(c) for c in child]
        if any(b.repeat > 1 for b in branches) or len({b.sizes is None for b in branches}) > 1:
            raise CompositionError(
                f"{child!r}: a branch of Parallel is a name, a Stack, or each a BatchSplit."
            )
        sizes = None if branches[0].sizes is None else sum((b.sizes or () for b in branches), ())
        return Routing(sum((b.chains for b in branches), ()), len(branches), sizes)
    if isinstance(child, BatchSplit):
        return _route_batch_split(child)
    if isinstance(child, Block):
        raise CompositionError(f"{child!r} cannot stand inside another block.")
    return Routing((_chain(child, Stack("")),))


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
    return Routing(chains, shape.repeat, shape.sizes)


def _route_batch_split(block: BatchSplit) -> Routing:
    chains: list[tuple[str, ...]] = []
    sizes: list[int] = []
    for child, size in zip(block, block.batch_sizes, strict=True):
        part = _route(child)
        if part.repeat > 1:
            raise CompositionError(f"{block!r}: Parallel cannot stand inside BatchSplit.")
        inner = part.sizes or (size,)
        if sum(inner) != size:
            raise CompositionError(f"{block!r}: {child!r} shares out {sum(inner)} of {size} rows.")
        chains += part.chains
        sizes += inner
    return Routing(tuple(chains), sizes=tuple(sizes))


def to_json(setup: Block | None) -> Any:
    """A setup as JSON knows it; `from_json` reads it back."""
    if not isinstance(setup, Block):
        return setup
    described: dict[str, Any] = {
        "type": type(setup).__name__,
        "children": [to_json(child) if isinstance(child, Block) else child for child in setup],
    }
    if isinstance(setup, BatchSplit):
        described["batch_sizes"] = list(setup.batch_sizes)
    return described


def from_json(described: Any) -> Block | None:
    """The setup that `to_json` has described.

    Raises:
        CompositionError: If it names a block that does not exist.
    """
    if described is None:
        return None
    kind = BLOCKS.get(described["type"])
    if kind is None:
        raise CompositionError(f"There is no block {described['type']!r}; known: {list(BLOCKS)}.")
    children = [from_json(c) if isinstance(c, dict) else c for c in described["children"]]
    if kind is Rows:
        return Rows(children)
    if kind is BatchSplit:
        return BatchSplit(*children, batch_sizes=described["batch_sizes"])
    return kind(*children)


BLOCKS: dict[str, type[Block]] = {
    block.__name__: block for block in (Stack, Parallel, BatchSplit, Rows)
}
