"""Composition blocks: how several named adapters act together, as hashable values without torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Union

from flexheads.errors import CompositionError

Child = Union[str, "Block", None]
Setup = Union[str, "Block", Sequence["Setup"], None]
"""What users write for a setup: a name, a block, a list (a Stack), or None for no adapter."""


class Block:
    """A composition of adapters: immutable, compared and hashed by its content."""

    __slots__ = ("children",)
    children: tuple[Child, ...]
    _may_be_bare: ClassVar[bool] = True
    """Whether None, the bare model, can be a branch."""

    def __init__(self, *children: Setup) -> None:
        if not children:
            raise CompositionError(f"{type(self).__name__} needs at least one adapter.")
        own = tuple(self._child(child, number) for number, child in enumerate(children))
        object.__setattr__(self, "children", own)

    def _child(self, child: Setup, number: int) -> Child:
        if isinstance(child, (Block, str)):
            return child
        if isinstance(child, (list, tuple)) and child:
            return Stack(*child)
        if self._may_be_bare and (child is None or child == [] or child == ()):
            return None
        bare = " and None" * self._may_be_bare
        raise CompositionError(
            f"{type(self).__name__}[{number}]: adapter names and blocks{bare} can stand here, "
            f"not {child!r}."
        )

    def with_children(self, children: Iterable[Child]) -> Block:
        """The same block of other branches, as many as before."""
        own = tuple(children)
        if own == self.children:
            return self
        block = object.__new__(type(self))
        for field in (
            name for kind in type(self).__mro__ for name in getattr(kind, "__slots__", ())
        ):
            object.__setattr__(block, field, own if field == "children" else getattr(self, field))
        return block

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
        return self._repr()

    def _repr(self, **fields: object) -> str:
        words = [*map(repr, self.children), *(f"{key}={value!r}" for key, value in fields.items())]
        return f"{type(self).__name__}({', '.join(words)})"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self.children

    def blocks(self) -> Iterator[Block]:
        """This block and every block inside."""
        yield self
        for child in self.children:
            if isinstance(child, Block):
                yield from child.blocks()

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

    __slots__ = ()
    _may_be_bare = False


class Fuse(Block):
    """AdapterFusion: attention over what each adapter would add (arXiv:2005.00247).

    Args:
        children: The adapters; a Stack stands for its last adapter, behind the others, which can
            be blocks.
        name: The fusion's name; None is the names of the adapters, joined by commas.
    """

    __slots__ = ("name",)
    name: str
    _may_be_bare = False

    def __init__(self, *children: Setup, name: str | None = None) -> None:
        super().__init__(*children)
        given = ",".join(self.members()) if name is None else name
        object.__setattr__(self, "name", given)

    def members(self) -> tuple[str, ...]:
        """The adapters that are fused: each child, or the last adapter of a Stack.

        Raises:
            CompositionError: If a child is no name and no Stack of names.
        """
        return tuple(_last(child, f"Fuse[{n}]") for n, child in enumerate(self.children))

    def _state(self) -> tuple[object, ...]:
        return self.children, self.name

    def __repr__(self) -> str:
        usual = ",".join(self.members())
        return super().__repr__() if self.name == usual else self._repr(name=self.name)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.children, {"name": self.name})


class Split(Block):
    """Consecutive positions of the sequence go to consecutive branches.

    Args:
        children: The branches.
        splits: Positions per branch: one number for all, or one for each.
    """

    __slots__ = ("splits",)
    splits: tuple[int, ...]

    def __init__(self, *children: Setup, splits: int | Sequence[int]) -> None:
        super().__init__(*children)
        object.__setattr__(self, "splits", _sizes(self, "splits", splits))

    def _state(self) -> tuple[object, ...]:
        return self.children, self.splits

    def __repr__(self) -> str:
        return self._repr(splits=list(self.splits))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.children, {"splits": self.splits})


class Average(Block):
    """The weighted mean of what the branches give.

    Args:
        children: The branches.
        weights: A number for each; None weighs all alike.
        normalize_weights: Divide the weights by their sum.
    """

    __slots__ = ("weights",)
    weights: tuple[float, ...]

    def __init__(
        self,
        *children: Setup,
        weights: Sequence[float] | None = None,
        normalize_weights: bool = True,
    ) -> None:
        super().__init__(*children)
        given = [1.0] * len(children) if weights is None else [float(w) for w in weights]
        if weights is None and not normalize_weights:
            given = [1.0 / len(children)] * len(children)
        if len(given) != len(children) or (normalize_weights and not sum(given)):
            raise CompositionError(
                f"Average has {len(children)} branches but weights={weights!r}; give one number "
                "for each, with a sum that is not zero."
            )
        total = sum(given) if normalize_weights else 1.0
        object.__setattr__(self, "weights", tuple(weight / total for weight in given))

    def _state(self) -> tuple[object, ...]:
        return self.children, self.weights

    def __repr__(self) -> str:
        return self._repr(weights=list(self.weights))

    def __reduce__(self) -> tuple[object, ...]:
        fields = {"weights": self.weights, "normalize_weights": False}
        return _rebuild, (type(self), self.children, fields)


class Parallel(Block):
    """Every row of the batch goes through each branch; the outputs follow one another.

    Inside of other blocks it repeats all of the setup that it stands in: ``Stack("a",
    Parallel("b", "c"))`` is ``Parallel(Stack("a", "b"), Stack("a", "c"))``.
    """

    __slots__ = ()


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
        object.__setattr__(self, "batch_sizes", _sizes(self, "batch_sizes", batch_sizes))

    def _state(self) -> tuple[object, ...]:
        return self.children, self.batch_sizes

    def __repr__(self) -> str:
        return self._repr(batch_sizes=list(self.batch_sizes))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.children, {"batch_sizes": self.batch_sizes})


class Rows(Block):
    """Each row of the batch goes its own way: ``Rows(["a", None, "b"])``; None is the bare model.

    Args:
        rows: For each row a setup of its own: a name, a block, or None.
    """

    __slots__ = ()

    def __init__(self, rows: Iterable[Setup]) -> None:
        if isinstance(rows, (str, Block)) or not hasattr(rows, "__iter__"):
            raise CompositionError(
                f"Rows takes a list with something for each row of the batch, not {rows!r}."
            )
        super().__init__(*rows)

    def __repr__(self) -> str:
        return f"Rows({list(self.children)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (list(self.children),)


class MultiTask(Block):
    """Each row of the batch goes to the branch of its task, which each call tells as ``task_ids``.

    What `Rows` says by values, this says by a tensor, so one compiled model serves any rows.

    Args:
        children: The branch of each task: an adapter name, a block that keeps the rows, or None.
    """

    __slots__ = ()

    def ids(self, rows: Iterable[Setup | int]) -> list[int]:
        """The numbers of tasks, for ``torch.tensor``, where each row says its branch or its number.

        Raises:
            CompositionError: If something stands for no task, or for several.
        """
        return [self._id(row) for row in rows]

    def _id(self, row: Any) -> int:
        wanted = Stack(*row) if isinstance(row, (list, tuple)) else row
        found = [task for task, child in enumerate(self) if task == row or child == wanted]
        if len(found) != 1:
            raise CompositionError(
                f"{row!r} stands for {len(found)} tasks of {self!r}; give a branch that is there "
                f"once, or the number of a task, 0 to {len(self) - 1}."
            )
        return found[0]


def _rebuild(kind: type[Block], children: tuple[Child, ...], fields: dict[str, Any]) -> Block:
    return kind(*children, **fields)


def _sizes(block: Block, field: str, sizes: int | Sequence[int]) -> tuple[int, ...]:
    """One size for each branch of a block."""
    count = len(block.children)
    each: list[Any] = [sizes] * count if isinstance(sizes, int) else list(sizes)
    if len(each) != count or not all(isinstance(size, int) and size >= 0 for size in each):
        raise CompositionError(
            f"{type(block).__name__} has {count} branches but {field}={sizes!r}; "
            "give one number, or one for each branch."
        )
    return tuple(each)


def _last(child: Child, place: str) -> str:
    if isinstance(child, str):
        return child
    if isinstance(child, Stack):
        return _last(child.children[-1], f"{place} > Stack[{len(child) - 1}]")
    raise CompositionError(
        f"{place}: {child!r} cannot stand inside Fuse here; a name can, or a Stack that ends in "
        f"one. AdapterFusion learns one attention over named adapters, so put the Fuse inside of "
        f"{type(child).__name__} instead."
    )


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


_FIELDS = {"BatchSplit": "batch_sizes", "Split": "splits", "Average": "weights", "Fuse": "name"}
"""What a block has beside its children."""


def to_json(setup: Block | None) -> Any:
    """A setup as JSON knows it; `from_json` reads it back."""
    if not isinstance(setup, Block):
        return setup
    described: dict[str, Any] = {
        "type": type(setup).__name__,
        "children": [to_json(child) if isinstance(child, Block) else child for child in setup],
    }
    field = _FIELDS.get(type(setup).__name__)
    if field is not None:
        value = getattr(setup, field)
        described[field] = list(value) if isinstance(value, tuple) else value
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
    field = _FIELDS.get(described["type"], "")
    fields = {field: described[field]} if field in described else {}
    if kind is Average:
        fields["normalize_weights"] = False
    return _rebuild(kind, tuple(children), fields)


BLOCKS: dict[str, type[Block]] = {
    block.__name__: block
    for block in (Stack, Fuse, Split, Average, Parallel, BatchSplit, Rows, MultiTask)
}
