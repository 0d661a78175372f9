"""Labels of a call: which head gets which, for which rows, checked before the backbone runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from flexheads.errors import LabelError, UnknownNameError
from flexheads.heads.base import PredictionHead
from flexheads.heads.labels import InputShape
from flexheads.models.calls.inputs import batch_size, repeat_rows
from flexheads.models.calls.task_ids import told_by_tensor
from flexheads.models.container import NamedModules
from flexheads.plan import Plan

USUAL = ("labels", "start_positions", "end_positions")
"""Arguments that are labels whatever head is active, so that none is silently ignored."""

Labels = Mapping[str, Any]


class HeadFacts(NamedTuple):
    """What a call has to know of the heads of its plan before they run.

    Attributes:
        label_arguments: The arguments that are labels, for them or for any head.
        read_layers: Whether one of them reads another layer than the last.
    """

    label_arguments: tuple[str, ...]
    read_layers: bool


def facts_of(plan: Plan, heads: NamedModules[PredictionHead]) -> HeadFacts:
    """What a call has to know of the heads of a plan."""
    own = [heads[route.head] for route in plan.heads]
    arguments = dict.fromkeys([*USUAL, *(name for head in own for name in head.label_names)])
    return HeadFacts(tuple(arguments), any(head.config.hidden_layer is not None for head in own))


def take_labels(
    inputs: dict[str, Any],
    plan: Plan,
    heads: NamedModules[PredictionHead],
    facts: HeadFacts,
) -> dict[str, Labels]:
    """Takes the label arguments out of the inputs, and says which head gets what.

    Args:
        inputs: The arguments of the call; labels are removed from it.
        plan: The plan of the call.
        heads: The model's heads.
        facts: What is known of the heads of the plan.

    Raises:
        LabelError: If there are labels, and no head is active.
        UnknownNameError: If they are for a head that is not.
    """
    found = {key: inputs.pop(key) for key in facts.label_arguments if key in inputs}
    labels = {key: value for key, value in found.items() if value is not None}
    if not labels:
        return {}
    names = [route.head for route in plan.heads]
    if not names:
        raise LabelError(
            f"{', '.join(labels)} given, but no head is active. Activate one with "
            "active_head or set_active_adapters, or name it with head=."
        )
    by_head = labels.get("labels")
    if not isinstance(by_head, Mapping):
        _refuse_unread(labels, names, heads)
        return dict.fromkeys(names, labels)
    if unknown := [name for name in by_head if name not in names]:
        raise UnknownNameError("active head", unknown[0], names)
    if beside := [key for key in labels if key != "labels"]:
        raise LabelError(
            f"{', '.join(beside)} given beside labels for each head, so that it is not clear for "
            "which head. Put them into labels, as {head: {argument: value}}."
        )
    given = {
        name: value if isinstance(value, Mapping) else {"labels": value}
        for name, value in by_head.items()
        if value is not None
    }
    for name, own_labels in given.items():
        _refuse_unread(own_labels, [name], heads)
    return given


def _refuse_unread(
    labels: Labels, names: Sequence[str], heads: NamedModules[PredictionHead]
) -> None:
    """Refuses labels that none of the heads reads, which otherwise had no effect.

    Raises:
        LabelError: If there are any.
    """
    read = {name: heads[name].label_names for name in names}
    unread = [key for key in labels if not any(key in own for own in read.values())]
    if unread:
        reads = "; ".join(f"{name!r} reads {', '.join(own)}" for name, own in read.items())
        raise LabelError(f"{', '.join(unread)} given, but no active head reads that: {reads}.")


def labels_by_route(
    labels: Mapping[str, Labels],
    plan: Plan,
    heads: NamedModules[PredictionHead],
    inputs: Mapping[str, Any],
    choices: int | None,
) -> list[Labels]:
    """The labels of each head of a plan, for the rows that it sees.

    Labels of a head whose adapters get some rows only may be those of the whole batch, or of just
    these rows.

    Args:
        labels: The label arguments of each head.
        plan: The plan of the call.
        heads: The model's heads.
        inputs: The backbone's inputs, before `Parallel` repeats them.
        choices: Choices per example, where the input had that dimension.

    Raises:
        LabelError: If labels do not fit the inputs or the head.
        CompositionError: If the rows of the plan do not fit the batch.
    """
    if not labels and all(route.chain is None for route in plan.heads):
        return [{} for _ in plan.heads]
    if told_by_tensor(plan):
        if labels:
            raise LabelError(
                "In compiled code the branches of MultiTask give scores without a loss, because "
                "nobody knows how many rows a head sees. Compute the loss of the scores, or call "
                "the model without compilation."
            )
        return [{} for _ in plan.heads]
    batch, found = batch_size(inputs), []
    length = _length(inputs)
    for route in plan.heads:
        given = labels.get(route.head, {})
        seen = batch
        own = plan.rows_of(route, batch * plan.routing.repeat)
        if own is not None and plan.routing.repeat == 1:
            seen = len(range(batch)[own]) if isinstance(own, slice) else len(own)
            given = {name: _cut(value, own, batch) for name, value in given.items()}
        if given:
            heads[route.head].check_labels(given, InputShape(seen, length, choices))
        if route.chain is None or plan.routing.single:
            given = repeat_rows(given, plan.routing.repeat)
        found.append(given)
    return found


def _cut(value: Any, rows: Sequence[int] | slice, batch: int) -> Any:
    """The rows of a label tensor that covers the whole batch."""
    whole = isinstance(value, Tensor) and value.dim() and value.shape[0] == batch
    return value[rows] if whole else value


def _length(inputs: Mapping[str, Any]) -> int | None:
    """Length of the sequence that heads read; None for images and sound."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds"):
        if isinstance(value := inputs.get(name), Tensor) and value.dim() > 1:
            return int(value.shape[1])
    return None
