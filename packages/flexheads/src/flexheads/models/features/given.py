"""A call that is given the backbone's features: what takes the place of running it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from flexheads.composition import Fuse, to_json
from flexheads.errors import ConfigError, UnsupportedError
from flexheads.heads.base import FeedForwardHead
from flexheads.plan import Plan
from flexheads.sites.prompt import POOLED

FEATURES = "features"
"""The argument of a model's forward that holds features."""
SETUP = "adapters"
"""Their entry that says with which adapters they were computed, as JSON."""
POOLED_AS = "pooled_"
"""How names of entries begin that are vectors for sequences."""


@dataclass
class FeaturesGiven(BaseModelOutputWithPooling):
    """The backbone's output, of which only what was stored is there.

    Attributes:
        pooled: For each kind of pooling one vector per row, ``(batch, hidden)``.
    """

    pooled: dict[str, Tensor] | None = None


def backbone_output(
    model: Any, plan: Plan, given: Mapping[str, Any]
) -> tuple[FeaturesGiven, tuple[Tensor, ...] | None]:
    """What the backbone would have given, from features that were computed before.

    Args:
        model: The model.
        plan: The plan of the call.
        given: The features.

    Returns:
        The output, and the states of every layer where they were stored.

    Raises:
        ConfigError: If they were computed with other adapters.
        UnsupportedError: If a head reads what was not stored, rows follow several chains, or what
            the features depend on is being trained.
    """
    now = json.dumps(to_json(plan.setup))
    if given.get(SETUP, now) != now:
        raise ConfigError(
            f"These features were computed with the adapters {given[SETUP]}, but in this call "
            f"{now} act. Activate those, or make a cache for these."
        )
    if model.training and torch.is_grad_enabled():
        refuse_trainable(model, plan)
    pooled = {n.removeprefix(POOLED_AS): t for n, t in given.items() if n.startswith(POOLED_AS)}
    states = given.get("hidden_states")
    for route in plan.heads:
        _check_read(model.heads[route.head], pooled, states is not None, model.spec.pooling)
    if (first := given.get("first")) is not None:
        model._attachment.runtime.put(POOLED, first)
    hidden = given.get("last_hidden_state")
    if hidden is None:  # nothing reads it, but it says how many rows there are
        vector = next(iter(pooled.values()))
        hidden = vector.new_zeros(vector.shape[0], 0, model.config.hidden_size)
    output = FeaturesGiven(
        last_hidden_state=hidden, pooler_output=given.get("pooler_output"), pooled=pooled or None
    )
    return output, None if states is None else states.unbind(dim=2)


def what_is_read(model: Any) -> tuple[str, ...]:
    """The kinds of pooling that the heads of a model read; its own where there is no head.

    Raises:
        UnsupportedError: If a head reads something else.
    """
    heads = model.heads.values()
    for head in heads:
        if _kind(head) is None:
            raise UnsupportedError(
                f'Head {head.name!r} reads more than a pooled vector; use what="hidden".'
            )
    kinds = {_kind(head) or "" for head in heads} or {""}
    return tuple(sorted(kind or str(model.spec.pooling) for kind in kinds))


def acting(plan: Plan) -> list[tuple[str, str]]:
    """The adapters and fusions of a plan: where a model has them, and their names."""
    if plan.setup is None:
        return []
    fusions = [block.name for block in plan.setup.blocks() if isinstance(block, Fuse)]
    found = [("adapters", name) for name in plan.setup.names()]
    return list(dict.fromkeys([*found, *(("adapter_fusions", name) for name in fusions)]))


def refuse_trainable(model: Any, plan: Plan) -> None:
    """Refuses to do without a backbone or adapters that want to be trained.

    Raises:
        UnsupportedError: If one of them is trainable.
    """
    for where, name in acting(plan):
        if any(p.requires_grad for p in getattr(model, where)[name].parameters()):
            raise UnsupportedError(
                f"{where}[{name!r}] is trainable, and stored features would keep it as it is. "
                f"Freeze it: model.{where}[{name!r}].requires_grad_(False)."
            )
    if any(parameter.requires_grad for parameter in model._backbone_parameters()):
        raise UnsupportedError(
            "The backbone is trainable, and stored features would keep it as it is. Call "
            "freeze_model() first."
        )


def _check_read(head: Any, pooled: Mapping[str, Tensor], layers: bool, usual: Any) -> None:
    if head.config.hidden_layer is not None and not layers:
        raise UnsupportedError(
            f"Head {head.name!r} reads a layer that was not stored; make the cache with "
            'what="layers".'
        )
    kind = _kind(head)
    if pooled and (kind is None or (kind or usual) not in pooled):
        raise UnsupportedError(
            f"Head {head.name!r} reads other features than the vectors that were stored "
            f"({', '.join(pooled)}); make the cache anew."
        )


def _kind(head: Any) -> str | None:
    """The kind of pooling that a head reads, and nothing else; empty for the model's own."""
    if not isinstance(head, FeedForwardHead) or head.config.hidden_layer is not None:
        return None
    asked = _Asked(head.hidden_size * head.width)
    try:
        head.read(asked)  # type: ignore[arg-type]
    except _ReadsMoreError:
        return None
    return asked.kinds[0] if len(set(asked.kinds)) == 1 else None


class _ReadsMoreError(Exception):
    """A head has asked for more than a pooled vector."""


class _Asked:
    """Stands for `flexheads.heads.Features`, and notes which pooled vector is asked for."""

    def __init__(self, width: int) -> None:
        self.width, self.kinds = width, list[str]()

    def pooled(self, pooling: str | None = None) -> Tensor:
        """See `flexheads.heads.Features.pooled`."""
        self.kinds.append(pooling or "")
        return torch.zeros(1, self.width)

    def __getattr__(self, name: str) -> Any:
        raise _ReadsMoreError(name)
