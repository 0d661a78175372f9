"""Metrics of each head, from what the stock trainer gathers in an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from flexheads.errors import ConfigError, UnknownNameError
from flexheads.heads.losses import IGNORED

Metric = Callable[[Any, Any], Mapping[str, float]]
"""Takes a head's predictions and labels, arrays in the order of the rows, and gives numbers."""


class MultiTaskMetrics:
    """``compute_metrics`` of the stock trainer, for models with several heads.

    Each metric gets what its head predicted, its logits as an array, or ``(start, end)`` logits,
    and its labels: an array, or ``(start, end)`` positions. Where several heads were evaluated
    together, the names of their metrics begin with that of the head; with
    ``eval_dataset={task: ...}``, as `MixedDataset.by_task` gives it, the trainer does that.

    The trainer joins batches by the place of their outputs, which goes wrong where batches have
    rows of different heads. Batches of several tasks therefore need
    ``TrainingArguments(eval_do_concat_batches=False)``; they are joined here then.

    Args:
        metrics: The metric of each head. Heads without one have their loss only.
        heads: The heads in the order in which all of them answer in every batch, that of
            ``active_head``, for samples with several labels; None is for batches that
            `MultiTaskCollator` has made.
    """

    def __init__(self, metrics: Mapping[str, Metric], heads: Sequence[str] | None = None) -> None:
        self.metrics, self.heads = dict(metrics), None if heads is None else tuple(heads)

    def __call__(self, evaluation: Any) -> dict[str, float]:
        """The numbers of an evaluation.

        Raises:
            ConfigError: If predictions and labels do not belong together.
        """
        outputs, labels = evaluation.predictions, evaluation.label_ids
        joined = not isinstance(labels, list)
        found: dict[str, list[tuple[Any, Any]]] = {}
        for output, truth in [(outputs, labels)] if joined else zip(outputs, labels, strict=True):
            for head, pair in self._by_head(output, truth, joined).items():
                found.setdefault(head, []).append(pair)
        numbers: dict[str, float] = {}
        for head in sorted(found):
            start = "" if len(found) == 1 else f"{head}_"
            own = self._of(head, *map(_joined, zip(*found[head], strict=True)))
            numbers |= {f"{start}{name}": number for name, number in own.items()}
        return numbers

    def _by_head(self, outputs: Any, labels: Any, joined: bool) -> dict[str, tuple[Any, Any]]:
        """What each head of a batch, or of all batches that the trainer joined, gave and got."""
        if not isinstance(labels, Mapping):
            raise ConfigError(
                "The labels are not by head, so it is not known whose metric is wanted; let "
                "MultiTaskCollator make the batches."
            )
        names = self.heads or sorted(labels)
        if len(names) > 1 and joined and self.heads is None:
            raise ConfigError(
                f"The trainer has joined batches with rows of {names} by the place of their "
                "outputs. Set eval_do_concat_batches=False in the TrainingArguments, or evaluate "
                "one task after the other, with eval_dataset={task: dataset}."
            )
        found = [outputs] if len(names) == 1 else list(outputs)
        if len(found) != len(names):
            raise ConfigError(f"{len(found)} heads predicted, but these were expected: {names}.")
        pairs = zip(names, found, strict=True)
        return {n: (_scores(one), _labels(labels[n])) for n, one in pairs if n in labels}

    def _of(self, head: str, predicted: Any, labels: Any) -> Mapping[str, float]:
        if head not in self.metrics:
            return {}
        rows = {len(part) for part in (*_parts(predicted), *_parts(labels))}
        if len(rows) != 1:
            raise ConfigError(f"Head {head!r}: {sorted(rows)} rows do not match.")
        return self.metrics[head](predicted, labels)


def _joined(parts: Sequence[Any]) -> Any:
    """The arrays of several batches as one, filled up with -100 where lengths differ."""
    if isinstance(parts[0], tuple):
        return tuple(_joined(own) for own in zip(*parts, strict=True))
    arrays = [np.asarray(part) for part in parts]
    if arrays[0].ndim > 1:
        longest = max(array.shape[1] for array in arrays)
        arrays = [
            np.pad(
                array,
                [(0, longest - array.shape[1] if axis == 1 else 0) for axis in range(array.ndim)],
                constant_values=IGNORED,
            )
            for array in arrays
        ]
    return np.concatenate(arrays)


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _scores(output: Any) -> Any:
    """The scores in a head's output."""
    if not isinstance(output, Mapping):
        return output
    if "start_logits" in output:
        return output["start_logits"], output["end_logits"]
    if "logits" in output:
        return output["logits"]
    raise UnknownNameError("prediction", "logits", output)


def _labels(truth: Any) -> Any:
    if isinstance(truth, Mapping) and "start_positions" in truth:
        return truth["start_positions"], truth["end_positions"]
    return truth


def accuracy(predicted: Any, labels: Any) -> dict[str, float]:
    """The share of labels that have the highest score; labels of -100 do not count.

    Args:
        predicted: Logits ``(..., classes)``.
        labels: Class numbers ``(...)``.
    """
    counts = np.asarray(labels) != IGNORED
    right = np.asarray(predicted).argmax(-1) == labels
    return {"accuracy": float(right[counts].mean()) if counts.any() else 0.0}


def exact_span(predicted: Any, labels: Any) -> dict[str, float]:
    """The share of spans whose start and whose end both have the highest score.

    Args:
        predicted: Start and end logits, each ``(rows, sequence)``.
        labels: Start and end positions, each ``(rows,)``.
    """
    hits = [
        np.asarray(p).argmax(-1) == np.asarray(t) for p, t in zip(predicted, labels, strict=True)
    ]
    return {"exact_span": float((hits[0] & hits[1]).mean())}


def entity_f1(names: Sequence[str]) -> Metric:
    """A metric: F1 of entities in the BIO scheme, counted over all rows (as CoNLL does).

    An entity counts where its kind and both its ends are right. ``I-`` behind something else than
    its own kind begins an entity.

    Args:
        names: The label names in order, as `get_labels` gives them.
    """

    def metric(predicted: Any, labels: Any) -> dict[str, float]:
        right = said = there = 0
        for scores, truth in zip(np.asarray(predicted), np.asarray(labels), strict=True):
            counts = truth != IGNORED
            own = entities([names[int(i)] for i in scores[counts].argmax(-1)])
            true = entities([names[int(i)] for i in truth[counts]])
            right, said, there = right + len(own & true), said + len(own), there + len(true)
        precision, recall = right / max(said, 1), right / max(there, 1)
        f1 = 2 * right / max(said + there, 1)
        return {"precision": precision, "recall": recall, "f1": f1}

    return metric


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities of a row of BIO tags: kind, first position, and the one behind the last."""
    found, kind, start = set(), "", 0
    for position, tag in enumerate([*tags, "O"]):
        part, _, own = tag.partition("-")
        if kind and (part != "I" or own != kind):
            found.add((kind, start, position))
            kind = ""
        if part in ("B", "I") and not kind:
            kind, start = own, position
    return found
