"""Rows of one batch that belong to different tasks: the adapters and the head of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from flexheads.composition import Block, Child, Rows, Setup, Stack, parse_composition
from flexheads.errors import CompositionError, ConfigError, UnknownNameError
from flexheads.plan import HeadRoute
from flexheads.routing import Routing, route


@dataclasses.dataclass(frozen=True)
class Task:
    """Where the rows of a task go.

    Attributes:
        head: The head; None is the one of the task's name.
        adapter: The adapters; an empty list is none, and None those of the task's name where the
            model has such an adapter, or else the active ones.
    """

    head: str | None = None
    adapter: Setup = None


class Tasks(Mapping[str, Task]):
    """Tasks by name, in order; the number of a task is its place in that order.

    Args:
        tasks: Names; or for each name a `Task`, the name of a head, or None.

    Raises:
        ConfigError: If there is none, or a value is nothing of that kind.
    """

    def __init__(self, tasks: Mapping[str, Task | str | None] | Sequence[str]) -> None:
        given = tasks if isinstance(tasks, Mapping) else dict.fromkeys(tasks)
        if not given or isinstance(tasks, str):
            raise ConfigError(
                f"Tasks are given by name, for example ['ner', 'topic'], not {tasks!r}."
            )
        self._tasks = {name: _task(name, value) for name, value in given.items()}
        self.names = tuple(self._tasks)

    def __getitem__(self, name: str) -> Task:
        if name not in self._tasks:
            raise UnknownNameError("task", name, self._tasks)
        return self._tasks[name]

    def __iter__(self) -> Any:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"Tasks({self._tasks!r})"

    def head(self, name: str) -> str:
        """The head of a task."""
        return self[name].head or name

    def number(self, name: str) -> int:
        """The number of a task."""
        self[name]
        return self.names.index(name)


def _task(name: str, value: Task | str | None) -> Task:
    if value is None or isinstance(value, str):
        return Task(head=value)
    if not isinstance(value, Task):
        raise ConfigError(
            f"Task {name!r} is {value!r}; it should be a Task, or the name of a head."
        )
    return value


def take_tasks(
    inputs: dict[str, Any], model: Any, adapter_names: Setup, head: Any
) -> tuple[Setup, Any]:
    """Takes ``task`` and ``tasks`` out of the inputs, and says where that sends each row.

    Args:
        inputs: The arguments of the call; labels of heads without a row are removed too.
        model: The model.
        adapter_names: The adapters of the call; where they are given, tasks choose heads only.
        head: The head of the call.

    Returns:
        The adapters and the head of the call.

    Raises:
        ConfigError: If ``task`` comes together with ``head``, or as numbers without ``tasks``.
        UnknownNameError: If there is no such task, head or adapter.
    """
    given, known = inputs.pop("task", None), inputs.pop("tasks", None)
    if given is None:
        return adapter_names, head
    known = model.tasks if known is None else known
    if head is not None:
        raise ConfigError("A call takes task= or head=, not both: a task has a head of its own.")
    names = _names(given, known)
    if not isinstance(known, Tasks):
        known = Tasks(tuple(dict.fromkeys(names)) if known is None else known)
    rows = [known.head(name) for name in names]
    labels = inputs.get("labels")
    if isinstance(labels, Mapping):  # a part of a batch may have rows of some heads only
        others = {known.head(name) for name in known} - set(rows)
        inputs["labels"] = {name: value for name, value in labels.items() if name not in others}
    if adapter_names is None:
        adapter_names = _adapters([known[name] for name in names], names, model)
    return adapter_names, rows[0] if isinstance(given, str) else Rows(rows)


def _names(given: Any, known: Any) -> list[str]:
    """The task of each row."""
    if isinstance(given, str):
        return [given]
    found = given.tolist() if isinstance(given, Tensor) else list(given)
    if all(isinstance(name, str) for name in found):
        return found
    if known is None:
        raise ConfigError(
            "task= holds numbers, and what they mean is missing: give tasks=, or set model.tasks."
        )
    table = known.names if isinstance(known, Tasks) else tuple(known)
    if wrong := [n for n in found if not isinstance(n, int) or not 0 <= n < len(table)]:
        raise UnknownNameError("task", wrong[0], table)
    return [table[number] for number in found]


def _adapters(tasks: Sequence[Task], names: Sequence[str], model: Any) -> Setup:
    """The adapters of all rows: one setup where they agree, `Rows` where they do not."""
    active = model._attachment.runtime.chosen().setup
    rows: list[Block | None] = []
    for name, task in zip(names, tasks, strict=True):
        if task.adapter is not None:
            rows.append(parse_composition(task.adapter))
        else:
            rows.append(Stack(name) if name in model.adapters else active)
    if len(set(rows)) > 1:
        return Rows(rows)
    return None if rows[0] is active else [] if rows[0] is None else rows[0]


def routes_of_rows(rows: Rows, heads: Collection[str], adapters: Routing) -> tuple[HeadRoute, ...]:
    """The heads of rows that have one each, in the order of their names.

    That order does not change from batch to batch with that of the rows.

    Args:
        rows: The head of each row, or None.
        heads: The names of the model's heads.
        adapters: The routing of the adapters in the same call.

    Raises:
        UnknownNameError: If there is no such head.
        CompositionError: If something else than a name stands for a row, or the adapters repeat
            the batch.
    """
    if adapters.repeat > 1:
        raise CompositionError(
            "Parallel repeats the batch, so its rows cannot have a head each; name heads for all."
        )
    for child in rows:
        _check_head(child, heads)
    routing = route(rows)
    numbered = {str(chain[0]): number for number, chain in enumerate(routing.chains) if chain}
    return tuple(HeadRoute(name, numbered[name], routing) for name in sorted(numbered))


def _check_head(child: Child, heads: Collection[str]) -> None:
    if isinstance(child, Block):
        raise CompositionError(f"A row has one head, so {child!r} cannot stand in head=Rows(...).")
    if child is not None and child not in heads:
        raise UnknownNameError("head", child, heads)
