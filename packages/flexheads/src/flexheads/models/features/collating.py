"""Batches of items that carry features: where each item's own positions are, and what pads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexheads.errors import ConfigError
from flexheads.models.features.given import FEATURES, SETUP

_IGNORED = -100
_NAMES = {"label": "labels", "label_ids": "labels"}


class FeatureCollator:
    """Makes a batch of items that carry features.

    Inputs and labels go through another collator; the features are laid where that puts the inputs
    of each item, with zeros where it pads.

    Args:
        collate: Makes a batch of items without features.
        setup: The adapters that the features were computed with, as JSON; None where they did not
            matter.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], setup: str | None) -> None:
        self.collate, self.setup = collate, setup

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of items.

        Raises:
            ConfigError: If the collator changes the inputs, for which the features then are wrong.
        """
        plain = [{k: v for k, v in item.items() if k != FEATURES} for item in items]
        batch = dict(self.collate(plain))
        found: dict[str, list[Tensor]] = {name: [] for name in items[0][FEATURES]}
        done = 0
        for item, own in zip(items, plain, strict=True):
            count, positions = own_positions(own, batch, done)
            done += count
            for name, tensor in item[FEATURES].items():
                found[name].append(_laid(tensor, positions, batch))
        if any(len({part.shape[1:] for part in parts}) > 1 for parts in found.values()):
            raise ConfigError(
                "The features of these items have different lengths, and there are no input_ids to "
                "tell where they are. Give all items one length, or collate items one by one."
            )
        batch[FEATURES] = {name: torch.cat(parts) for name, parts in found.items()}
        if self.setup is not None:
            batch[FEATURES][SETUP] = self.setup
        return batch


def own_positions(item: Mapping[str, Any], batch: Mapping[str, Any], row: int) -> tuple[int, slice]:
    """How many rows of a batch an item became, and where its positions are in them.

    Args:
        item: The item, before it was collated.
        batch: The batch.
        row: The first of its rows, where the rows of choices count each.

    Raises:
        ConfigError: If its tokens are not there.
    """
    if "input_ids" not in item:
        return 1, slice(None)
    given = item["input_ids"]
    choices = _depth(given) == 2
    sequences = [torch.as_tensor(ids) for ids in (given if choices else [given])]
    rows = batch["input_ids"].flatten(0, -2)[row : row + len(sequences)].cpu()
    own, longest = max(len(ids) for ids in sequences), rows.shape[-1]
    sides = (slice(0, own), slice(longest - own, longest))
    for number, side in enumerate(sides):
        for ids, there in zip(sequences, rows[:, side], strict=True):
            if not torch.equal(there[: len(ids)] if number == 0 else there[-len(ids) :], ids):
                break
        else:
            return len(sequences), side
    raise ConfigError(
        "The collator does not keep the input_ids of items as they are, so features that were "
        "computed once would be wrong. Change inputs before, in the data set."
    )


def pad_items(pad: int | None) -> Callable[[list[Any]], dict[str, Any]]:
    """A collator that pads on the right: ids with `pad`, labels with -100, all else with zero.

    Args:
        pad: The id of the padding token.
    """
    return _Padding(pad or 0)


class _Padding:
    """What `pad_items` returns, as something that can be pickled."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        items = [{_NAMES.get(name, name): value for name, value in item.items()} for item in items]
        if "input_ids" in items[0] and "attention_mask" not in items[0]:
            items = [{**i, "attention_mask": _ones(i["input_ids"])} for i in items]
        long = [name for name, value in items[0].items() if _depth(value)]
        short = [{n: v for n, v in item.items() if n not in long} for item in items]
        batch: dict[str, Any] = _with_default(short) if short[0] else {}
        for name in long:
            batch[name] = _padded([item[name] for item in items], self._with(name))
        return batch

    def _with(self, name: str) -> int:
        return {"input_ids": self.pad, "labels": _IGNORED}.get(name, 0)


def _ones(ids: Any) -> Any:
    return [_ones(row) for row in ids] if _depth(ids) > 1 else [1] * len(ids)


def _depth(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.dim()
    if hasattr(value, "ndim"):
        return int(value.ndim)
    return 1 + _depth(value[0]) if isinstance(value, list | tuple) and len(value) else 0


def _with_default(items: list[Any]) -> dict[str, Any]:
    """What transformers' own collator makes of items."""
    from transformers import default_data_collator  # it brings tokenizers, which take a while

    batch: dict[str, Any] = default_data_collator(items)
    return batch


def _padded(values: list[Any], fill: int) -> Tensor:
    """Values of up to two dimensions in one tensor; those of more have one shape."""
    depth = _depth(values[0])
    if depth == 2 and not isinstance(values[0], Tensor):
        rows = [torch.as_tensor(row) for value in values for row in value]
        counts = {len(value) for value in values}
        if len(counts) > 1:
            raise ConfigError(f"The items have different numbers of choices: {sorted(counts)}.")
        flat = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
        return flat.view(len(values), counts.pop(), -1)
    tensors = [torch.as_tensor(value) for value in values]
    if depth > 1:
        return torch.stack(tensors)
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


def _laid(tensor: Tensor, positions: slice, batch: Mapping[str, Any]) -> Tensor:
    """Features of an item among the positions of its batch; what has no positions as it is."""
    if positions.start is None or tensor.dim() < 3:
        return tensor.clone()
    length = batch["input_ids"].shape[-1]
    laid = tensor.new_zeros(tensor.shape[0], length, *tensor.shape[2:])
    laid[:, positions] = tensor
    return laid
