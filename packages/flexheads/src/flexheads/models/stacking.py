"""The heads of a call: those of one shape that see the same rows run as one product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from flexheads.heads.base import PredictionHead
from flexheads.heads.features import Features
from flexheads.heads.stacking import HeadStack, Structure, stack_key
from flexheads.models.container import NamedModules
from flexheads.models.labels import Labels
from flexheads.plan import HeadRoute, Plan
from flexheads.sites.derived import hooked_everywhere, traced, wants_gradients

_STACKS_KEPT = 4


@dataclasses.dataclass(frozen=True)
class _Group:
    """Heads of a plan that can run as one product: their places in its order, and their names."""

    places: tuple[int, ...]
    names: tuple[str, ...]
    structure: Structure


class HeadStacks:
    """Runs the heads of plans, and keeps stacks of their weights between calls.

    A stack is a copy of the weights of a group of heads. It is made in the first inference call
    that needs it; a few are kept, until a weight or a head changes, or one of the heads trains.
    Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._groups: WeakKeyDictionary[Plan, tuple[_Group, ...]] = WeakKeyDictionary()
        self._stacks: dict[tuple[str, ...], HeadStack] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def clear(self) -> None:
        """Forgets everything, because heads have come or gone."""
        self._groups.clear()
        self._stacks.clear()

    def run(
        self,
        plan: Plan,
        heads: NamedModules[PredictionHead],
        features: Callable[[HeadRoute], Features],
        labels: Sequence[Labels],
    ) -> list[Any]:
        """The outputs of the heads of a plan, in its order.

        Args:
            plan: The plan.
            heads: The model's heads.
            features: What the head of a route sees of the pass.
            labels: The labels of each head.
        """
        outputs: dict[int, Any] = {}
        for group in self._of(plan, heads) if _eager(plan) else ():
            stack = self._stack(group, len(plan.heads) // 2)
            if stack is None:
                continue
            first = group.structure.heads[0]
            seen = first.view(features(plan.heads[group.places[0]]))
            scores = stack(first.read(seen))
            for place, head, own in zip(group.places, group.structure.heads, scores, strict=True):
                outputs[place] = head.finish(own, seen, **labels[place])
        for place, route in enumerate(plan.heads):
            if place not in outputs:
                alone = heads[route.head]
                outputs[place] = alone(alone.view(features(route)), **labels[place])
        return [outputs[place] for place in range(len(outputs))]

    def _of(self, plan: Plan, heads: NamedModules[PredictionHead]) -> tuple[_Group, ...]:
        groups = self._groups.get(plan)
        if groups is None or not all(group.structure.holds(heads._modules) for group in groups):
            groups = self._groups[plan] = _grouped(plan, heads)
        return groups

    def _stack(self, group: _Group, kept: int) -> HeadStack | None:
        """The stacked weights of a group; None where each head shall run by itself.

        Args:
            group: The group.
            kept: How many stacks the plan may need.
        """
        stack = self._stacks.get(group.names)
        structure = group.structure
        if structure.dropping() or wants_gradients(structure.parameters):
            # Optimizers may write to weights in ways that leave no trace.
            self._stacks.pop(group.names, None)
            return None
        if stack is None or not stack.current(structure.parameters):
            self._stacks.pop(group.names, None)
            stack = self._stacks[group.names] = HeadStack(structure.heads)
            for oldest in list(self._stacks)[: -max(_STACKS_KEPT, kept)]:
                self._stacks.pop(oldest, None)
        return stack


def _eager(plan: Plan) -> bool:
    """Whether there are several heads, and nobody watches them from outside."""
    return len(plan.heads) > 1 and not (traced() or hooked_everywhere())


def _grouped(plan: Plan, heads: NamedModules[PredictionHead]) -> tuple[_Group, ...]:
    """The heads of a plan that see the same rows and have one `stack_key`."""
    together: dict[Any, list[int]] = {}
    for place, route in enumerate(plan.heads):
        if (key := stack_key(heads[route.head])) is not None:
            together.setdefault((_rows(plan, route), key), []).append(place)
    found = []
    for places in together.values():
        if len(places) > 1:
            names = tuple(plan.heads[place].head for place in places)
            modules: Any = [heads[name] for name in names]
            found.append(_Group(tuple(places), names, Structure(modules, heads._modules)))
    return tuple(found)


def _rows(plan: Plan, route: HeadRoute) -> Any:
    """What decides which rows a head sees; None for all."""
    routing = route.routing or plan.routing
    return None if route.chain is None or routing.single else (routing, route.chain)
