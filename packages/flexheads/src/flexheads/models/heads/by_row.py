"""The head of each row, where nothing but a tensor tells which one that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flexheads.errors import CompositionError
from flexheads.heads.base import FeedForwardHead, PredictionHead
from flexheads.heads.features import Features
from flexheads.heads.layers import Stacked
from flexheads.heads.stacking import READS_ALIKE, scores_by_row
from flexheads.models.container import NamedModules
from flexheads.models.heads.seen import features_of
from flexheads.plan import HeadRoute, Plan
from flexheads.sites.rows import TensorRows


def run_by_row(plan: Plan, heads: NamedModules[PredictionHead], features: Features) -> Any:
    """One output with the scores of every row, each from the head of its own branch.

    Heads of linear layers run as one product, with weights that are picked by row. Others run on
    all rows, and each row keeps what its own head gives.

    Args:
        plan: A plan of compiled code, with one head for each chain.
        heads: The model's heads.
        features: What the backbone computed.

    Raises:
        CompositionError: If the heads do not give scores of one shape.
    """
    routes = sorted(plan.heads, key=lambda route: route.chain or 0)
    own: list[Any] = [heads[route.head] for route in routes]
    _check_alike(own)
    rows: TensorRows = plan.rows
    first = own[0]
    if _stackable(own):
        seen = first.view(features)
        return first.finish(scores_by_row(own, rows.index, first.read(seen)), seen)
    found = [_run(head, plan, route, features) for head, route in zip(own, routes, strict=True)]
    return _merged(found, rows, features.output, own)


def _run(head: Any, plan: Plan, route: HeadRoute, features: Features) -> Any:
    """What a head gives for all rows, as if all followed its chain."""
    return head(head.view(features_of(features, plan, route, slice(None))))


def _stackable(heads: Sequence[Any]) -> bool:
    """Whether heads read the same, have layers of one shape, and only pack their scores.

    It is asked while code is traced, which `stack_key` does not bear.
    """
    return isinstance(heads[0], FeedForwardHead) and all(
        type(head.layers) is Stacked
        and head.packs
        and head.config.hidden_layer != "mix"
        and list(head._modules) == ["layers"]
        and _form(head) == _form(heads[0])
        and not (head.training and head.layers.dropout.p > 0)
        and not any(m._forward_hooks or m._forward_pre_hooks for m in head.modules())
        for head in heads
    )


def _form(head: Any) -> tuple[Any, ...]:
    """What heads have in common that can run as one product."""
    reads = {name: value for name, value in vars(head.config).items() if name not in READS_ALIKE}
    shapes = [(name, tuple(p.shape), p.dtype) for name, p in head.layers.named_parameters()]
    return reads, shapes, str(head.config.activation_function).lower()


def _merged(found: Sequence[Any], rows: TensorRows, backbone: Any, heads: Sequence[Any]) -> Any:
    """The outputs of heads as one, in which each row has what its own head gave."""
    first = found[0]
    fields = {}
    for name, value in first.items():
        fields[name] = value
        if name not in backbone and isinstance(value, Tensor):
            parts = [output[name] for output in found]
            if any(part.shape != value.shape for part in parts):
                raise _unlike(heads)
            fields[name] = rows.merge(parts)
    return type(first)(**fields)


def _check_alike(heads: Sequence[PredictionHead]) -> None:
    sizes = {(type(head), getattr(head, "num_outputs", None)) for head in heads}
    if len(sizes) > 1:
        raise _unlike(heads)


def _unlike(heads: Sequence[PredictionHead]) -> CompositionError:
    shown = ", ".join(
        f"{head.name!r} ({head.head_type}, {getattr(head, 'num_outputs', '?')} scores)"
        for head in heads
    )
    return CompositionError(
        "In compiled code the branches of MultiTask give one output with the scores of every row, "
        f"so their heads have to be of one type and size, but here they are {shown}. Name heads "
        "for all rows with head=, or call the model without compilation."
    )
