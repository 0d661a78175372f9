"""One collator for rows of different tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from flexheads.errors import ConfigError, LabelError
from flexheads.heads.losses import IGNORED
from flexheads.models.calls.tasks import Task, Tasks
from flexheads.training.datasets import COLUMN

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_NAMES = {"label": "labels", "label_ids": "labels"}
_POSITIONS = ("start_positions", "end_positions")

_pad: Any = pad_without_fast_tokenizer_warning

Item = Mapping[str, Any]


class MultiTaskCollator:
    """Makes one batch of items of different tasks, each row of which goes its own way.

    Items have ``input_ids``, what else the tokenizer gives, a column ``task``, and labels:
    ``labels`` (``label``, ``label_ids``) or ``start_positions`` and ``end_positions``. Labels with
    one number for each token are padded with -100; where the ``input_ids`` are lists of one row for
    each choice, every choice becomes a row of the batch.

    The batch has ``input_ids`` and so on, ``(rows, longest)``; ``labels``, for each head those of
    its rows, in their order; ``task``, the number of each row's task, ``(rows,)``; and ``tasks``,
    which says where each task goes. The forward of a model with flexible heads takes all of them.

    Args:
        tokenizer: What pads; on the side, and with the token, that it says.
        tasks: Names of tasks, or for each name a `Task`, the name of a head, or None, see `Tasks`.
        token_labels: For the tasks that are named in it, whether labels have one number for each
            token; for others that shows in the labels, which is right unless a list of numbers for
            the row happens to be as long as all its rows.
        label_names: Further columns that are labels of heads.
        whole_batch: Make batches of nothing but tensors with a value for each row, which can be cut
            into parts of rows and sent around, as accelerate does where one process loads for all.
            Each head has labels for every row, of which those of other heads' rows do not count.
            ``tasks`` is left out, so set ``model.tasks = collator.tasks``. Not for tasks with
            choices.
        pad_to_multiple_of: The length of rows is a multiple of it.

    Raises:
        ConfigError: If the tasks make no sense.
    """

    def __init__(
        self,
        tokenizer: Any,
        tasks: Mapping[str, Task | str | None] | Sequence[str],
        *,
        token_labels: Mapping[str, bool] | None = None,
        label_names: Sequence[str] = (),
        whole_batch: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.tasks = tasks if isinstance(tasks, Tasks) else Tasks(tasks)
        self.token_labels = dict(token_labels or {})
        for name in self.token_labels:
            self.tasks.number(name)
        self.label_names = ("labels", *_NAMES, *_POSITIONS, *label_names)
        self.whole_batch, self.pad_to_multiple_of = whole_batch, pad_to_multiple_of

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """The batch of some items.

        Raises:
            ConfigError: If an item names no task, or has no ``input_ids``.
            UnknownNameError: If it names a task that there is not.
            LabelError: If some items of a head have labels and others have not.
        """
        rows: list[dict[str, Any]] = []
        numbers: list[int] = []
        places: list[int] = []  # the first row of each item
        for item in items:
            own = _rows_of(item)
            places.append(len(rows))
            rows += own
            numbers += [self.tasks.number(_task_of(item))] * len(own)
        batch: dict[str, Any] = dict(self._padded(rows))
        labels = self._labels(items, places, batch["input_ids"])
        if labels:
            batch["labels"] = labels
        batch["task"] = torch.tensor(numbers)
        return batch if self.whole_batch else {**batch, "tasks": self.tasks}

    def _padded(self, rows: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        """The inputs, padded to the longest row."""
        names = [name for name in _INPUTS if any(name in row for row in rows)]
        for row in rows:
            length = len(row["input_ids"])
            row.setdefault("attention_mask", [1] * length)
            if "token_type_ids" in names:
                row.setdefault("token_type_ids", [0] * length)
        padded: Mapping[str, Tensor] = _pad(
            self.tokenizer,
            rows,
            padding=True,
            pad_to_multiple_of=self.pad_to_multiple_of,
            return_tensors="pt",
        )
        return padded

    def _labels(self, items: Sequence[Item], places: list[int], ids: Tensor) -> dict[str, Any]:
        """For each head the labels of its rows, in the order of the heads' names."""
        by_head: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            by_head.setdefault(self.tasks.head(item[COLUMN]), []).append(index)
        found = {}
        for head in sorted(by_head):
            own = [(items[index], places[index]) for index in by_head[head]]
            labels = self._labels_of(head, own, ids)
            if labels:
                found[head] = labels["labels"] if list(labels) == ["labels"] else labels
        return found

    def _labels_of(self, head: str, own: list[tuple[Item, int]], ids: Tensor) -> dict[str, Tensor]:
        found = {}
        for name in self.label_names:
            given = [(item, row) for item, row in own if item.get(name) is not None]
            if given and len(given) < len(own):
                raise LabelError(
                    f"Head {head!r}: {len(given)} of its {len(own)} items in a batch have "
                    f"{name!r}. Give labels for all or for none."
                )
            if given:
                tensor = self._label_tensor(name, head, [item for item, _ in given], ids)
                spread = self._spread(tensor, head, [row for _, row in given], given, len(ids))
                found[_NAMES.get(name, name)] = spread
        return found

    def _label_tensor(self, name: str, head: str, items: list[Item], ids: Tensor) -> Tensor:
        """The labels of one head as a tensor, those of tokens padded as the tokens are."""
        longest, left = ids.shape[1], self.tokenizer.padding_side == "left"
        values = [_plain(item[name]) for item in items]
        lengths = [len(item["input_ids"]) for item in items]
        if name in _POSITIONS:
            moved = [longest - length if left else 0 for length in lengths]
            return torch.tensor([value + by for value, by in zip(values, moved, strict=True)])
        if self._by_token(name, items, values):
            pads = [[IGNORED] * (longest - len(value)) for value in values]
            pairs = zip(values, pads, strict=True)
            values = [pad + value if left else value + pad for value, pad in pairs]
        try:
            return torch.tensor(values)
        except (ValueError, TypeError) as error:
            raise LabelError(
                f"The {name} of head {head!r} make no tensor: {error}. Labels of tokens have one "
                "number for each of the input_ids."
            ) from error

    def _by_token(self, name: str, items: list[Item], values: list[Any]) -> bool:
        """Whether labels have one number for each token.

        Raises:
            LabelError: If they should, and have not.
        """
        said = self.token_labels.get(items[0][COLUMN])
        if said is False:
            return False
        for item, value in zip(items, values, strict=True):
            length = len(item["input_ids"])
            if isinstance(value, list) and len(value) == length:
                continue
            if said:
                count = len(value) if isinstance(value, list) else "no"
                raise LabelError(
                    f"An item of task {item[COLUMN]!r} has {count} labels for {length} tokens."
                )
            return False
        return True

    def _spread(
        self, labels: Tensor, head: str, rows: list[int], given: Sequence[Any], batch: int
    ) -> Tensor:
        """Labels for the whole batch, where these are wanted."""
        if not self.whole_batch:
            return labels
        if any(_has_choices(item) for item, _ in given):
            raise ConfigError(
                f"Head {head!r} has items with choices, which cannot be cut into rows, so "
                "whole_batch=True is not for them."
            )
        filler = 0.0 if labels.is_floating_point() else IGNORED
        whole = labels.new_full((batch, *labels.shape[1:]), filler)
        whole[rows] = labels
        return whole


def _task_of(item: Item) -> str:
    if not isinstance(item.get(COLUMN), str):
        raise ConfigError(
            f"An item has no task: its columns are {sorted(item)}. Put the task's name into "
            f"{COLUMN!r}, as MixedDataset and TaskDataset do."
        )
    return str(item[COLUMN])


def _has_choices(item: Item) -> bool:
    ids = item["input_ids"]
    return len(ids) > 0 and hasattr(ids[0], "__len__")


def _rows_of(item: Item) -> list[dict[str, Any]]:
    """The rows of an item: one, or one for each choice."""
    if "input_ids" not in item:
        raise ConfigError(f"An item has no input_ids, but {sorted(item)}. Tokenize it first.")
    inputs = {name: _plain(item[name]) for name in _INPUTS if item.get(name) is not None}
    if not _has_choices(item):
        return [inputs]
    return [
        {name: value[i] for name, value in inputs.items()} for i in range(len(item["input_ids"]))
    ]


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists."""
    return value.tolist() if hasattr(value, "tolist") else value
