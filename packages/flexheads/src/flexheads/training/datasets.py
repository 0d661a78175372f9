"""Datasets of several tasks mixed into one, whose items say which task they are of."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from torch.utils.data import Dataset, IterableDataset

from flexheads.errors import ConfigError

Sampling = Literal["proportional", "temperature", "uniform", "round_robin"]
Item = dict[str, Any]

COLUMN = "task"
"""The column that names the task of an item."""


class TaskDataset(Dataset[Item]):
    """The items of one task, each with its name in the column ``task``.

    Args:
        task: The task's name.
        data: Anything with a length whose items are mappings: a list, a torch or a
            ``datasets.Dataset``.

    Raises:
        ConfigError: If it has no length, or is empty.
    """

    def __init__(self, task: str, data: Any) -> None:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ConfigError(
                f"The data of task {task!r} are a {type(data).__name__}; items are drawn by number,"
                " so something with a length is needed, for example a list."
            )
        if not len(data):
            raise ConfigError(f"The data of task {task!r} are empty.")
        self.task, self.data = task, data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        item = self.data[int(index)]
        if not isinstance(item, Mapping):
            raise ConfigError(
                f"Item {index} of task {self.task!r} is a {type(item).__name__}; items are mappings"
                " from column to value."
            )
        if item.get(COLUMN, self.task) != self.task:
            raise ConfigError(
                f"Item {index} of task {self.task!r} says that it is of task {item[COLUMN]!r}."
            )
        return {**item, COLUMN: self.task}


class MixedDataset(Dataset[Item]):
    """Several datasets as one, in which each task has its share.

    An epoch has ``size`` items. Each task gets its share of them, exactly up to rounding; its items
    come in a random order, and again only when all have come. ``set_epoch``, which the stock
    trainer calls, draws anew, so what did not come in one epoch comes in another. The order of the
    tasks is random too, except under ``"round_robin"``.

    The trainer's own sampler shuffles the items once more. That keeps the shares and loses the
    order; where the order matters, train on `in_order`.

    Args:
        datasets: For each task its data, see `TaskDataset`.
        sampling: What the shares are proportional to: ``"proportional"``, to the number of items;
            ``"temperature"``, to that number to the power of ``1 / temperature``
            (arXiv:1907.05019); ``"uniform"``, all alike; ``"round_robin"``, all alike, and the
            tasks take turns, see `block`.
        temperature: 1 is proportional; the larger, the more alike.
        size: Items in an epoch; None is as many as there are.
        block: Under ``"round_robin"``, how many items of one task come in a row: one number for all
            tasks, or one for each, and then the shares are as these are. With the size of a batch,
            or multiples of it, `in_order` gives batches of one task each.
        seed: Of everything random.

    Raises:
        ConfigError: If the arguments make no sense.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any],
        sampling: Sampling = "proportional",
        *,
        temperature: float | None = None,
        size: int | None = None,
        block: int | Mapping[str, int] = 1,
        seed: int = 0,
    ) -> None:
        if not datasets or not hasattr(datasets, "items"):
            raise ConfigError("A MixedDataset takes datasets by task, for example {'ner': ...}.")
        if sampling not in _WEIGHTS:
            raise ConfigError(f"sampling={sampling!r} is unknown. Known: {', '.join(_WEIGHTS)}.")
        if (temperature is not None) != (sampling == "temperature"):
            raise ConfigError("temperature= and sampling='temperature' belong together.")
        if temperature is not None and not temperature > 0:
            raise ConfigError(f"temperature={temperature!r} should be a number over 0.")
        if block != 1 and sampling != "round_robin":
            raise ConfigError("block= is for sampling='round_robin'.")
        self.tasks = {name: TaskDataset(name, data) for name, data in datasets.items()}
        self.sampling, self.temperature, self.seed = sampling, temperature, seed
        self.blocks = dict(block) if isinstance(block, Mapping) else dict.fromkeys(datasets, block)
        if set(self.blocks) != set(datasets) or min(self.blocks.values()) < 1:
            raise ConfigError(f"block={block!r} is 1 or more, for all tasks or for each.")
        self.size = sum(map(len, self.tasks.values())) if size is None else size
        if self.size < 1:
            raise ConfigError(f"size={size!r} should be 1 or more.")
        self.set_epoch(0)

    @property
    def shares(self) -> dict[str, float]:
        """The share of each task, 1 together."""
        weigh = _WEIGHTS[self.sampling]
        weights = {
            name: weigh(len(data), self.temperature) * self.blocks[name]
            for name, data in self.tasks.items()
        }
        total = sum(weights.values())
        return {name: weight / total for name, weight in weights.items()}

    def counts(self) -> dict[str, int]:
        """The items of each task in the epoch."""
        found = dict.fromkeys(self.tasks, 0)
        for task, _ in self._plan:
            found[task] += 1
        return found

    def set_epoch(self, epoch: int) -> None:
        """Draws the items of an epoch; the same seed and epoch always draw the same."""
        self.epoch = epoch
        order = self._order()
        draws = {name: self._draws(name, epoch * order.count(name)) for name in self.tasks}
        self._plan = [(name, next(draws[name])) for name in order]

    def in_order(self) -> OrderedMixture:
        """The same items, for a loader that asks for no numbers: they come in their order."""
        return OrderedMixture(self)

    def by_task(self) -> dict[str, TaskDataset]:
        """The data of each task by itself, as the trainer takes them for ``eval_dataset``."""
        return dict(self.tasks)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Item:
        task, number = self._plan[index]
        return self.tasks[task][number]

    def _order(self) -> list[str]:
        """The task of each item in the epoch."""
        names = list(self.tasks)
        if self.sampling == "round_robin":
            turn = [name for name in names for _ in range(self.blocks[name])]
            return [turn[i % len(turn)] for i in range(self.size)]
        counts = _rounded(self.shares, self.size)
        order = [name for name in names for _ in range(counts[name])]
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        return order

    def _draws(self, task: str, drawn: int) -> Iterator[int]:
        """Numbers of items, each once before any comes again, after so many were drawn."""
        size = len(self.tasks[task])
        turn, within = divmod(drawn, size)
        while True:
            numbers = list(range(size))
            random.Random(f"{self.seed} {task} {turn}").shuffle(numbers)
            yield from numbers[within:]
            turn, within = turn + 1, 0


class OrderedMixture(IterableDataset[Item]):
    """The items of a `MixedDataset` in their own order, which no sampler changes.

    With several workers each loads a part of the items, so they come in another order.

    Args:
        mixed: The items.
    """

    def __init__(self, mixed: MixedDataset) -> None:
        self.mixed = mixed

    def set_epoch(self, epoch: int) -> None:
        """Draws the items of an epoch, see `MixedDataset.set_epoch`."""
        self.mixed.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.mixed)

    def __iter__(self) -> Iterator[Item]:
        return (self.mixed[index] for index in _own_part(len(self.mixed)))


def _own_part(size: int) -> range:
    """What a worker of a loader is to load; everything where there is none."""
    from torch.utils.data import get_worker_info

    worker = get_worker_info()
    return range(size) if worker is None else range(worker.id, size, worker.num_workers)


def _rounded(shares: Mapping[str, float], size: int) -> dict[str, int]:
    """Whole numbers with a given sum, as near to the shares as can be (largest remainder)."""
    exact = {name: share * size for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    missing = size - sum(counts.values())
    for name in sorted(exact, key=lambda n: counts[n] - exact[n])[:missing]:
        counts[name] += 1
    return counts


_WEIGHTS: dict[str, Callable[[int, float | None], float]] = {
    "proportional": lambda size, temperature: float(size),
    "temperature": lambda size, temperature: float(size) ** (1.0 / (temperature or 1.0)),
    "uniform": lambda size, temperature: 1.0,
    "round_robin": lambda size, temperature: 1.0,
}
