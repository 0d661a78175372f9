"""The heads of a call: those of one shape that see the same rows run as one product."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor

from flexheads.heads.base import FeedForwardHead, PredictionHead
from flexheads.heads.features import Features
from flexheads.heads.outputs import with_logits
from flexheads.heads.stacking import HeadStack, Structure, split, stack_key
from flexheads.models.calls.labels import HeadFacts, Labels, facts_of
from flexheads.models.container import NamedModules
from flexheads.plan import HeadRoute, Plan
from flexheads.sites.derived import hooked_everywhere, traced, wants_gradients

_STACKS_KEPT = 4


@dataclasses.dataclass(frozen=True)
class _Group:
    """Heads of a plan that can run as one product: their places in its order, and their names."""

    places: tuple[int, ...]
    names: tuple[str, ...]
    structure: Structure

    @functools.cached_property
    def kinds(self) -> Sequence[tuple[type[FeedForwardHead], FeedForwardHead]]:
        """Each class with one of its heads, where all heads only pack their scores, or none."""
        heads = self.structure.heads
        return tuple({type(h): h for h in heads}.items()) if all(h.packs for h in heads) else ()


class HeadStacks:
    """Runs the heads of plans, and keeps stacks of their weights between calls.

    A stack is a copy of the weights of a group of heads. It is made in the first inference call
    that needs it; a few are kept, until a weight or a head changes, or one of the heads trains.
    Copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._groups: WeakKeyDictionary[Plan, tuple[_Group, ...]] = WeakKeyDictionary()
        self._stacks: dict[tuple[str, ...], HeadStack] = {}
        self._facts: WeakKeyDictionary[Plan, HeadFacts] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def clear(self) -> None:
        """Forgets everything, because heads have come or gone."""
        self._groups.clear()
        self._stacks.clear()
        self._facts.clear()

    def facts(self, plan: Plan, heads: NamedModules[PredictionHead]) -> HeadFacts:
        """What a call has to know of the heads of its plan, found out once."""
        facts = None if traced() else self._facts.get(plan)
        if facts is None:
            facts = facts_of(plan, heads)
            if not traced():
                self._facts[plan] = facts
        return facts

    def run(
        self,
        plan: Plan,
        heads: NamedModules[PredictionHead],
        features: Callable[[HeadRoute], Features],
        labels: Sequence[Labels],
    ) -> list[Any] | Callable[[], list[Any]]:
        """Runs the heads of a plan.

        Args:
            plan: The plan.
            heads: The model's heads.
            features: What the head of a route sees of the pass.
            labels: The labels of each head.

        Returns:
            The outputs, in the order of the plan; or what makes them, where all scores are there
            and have only to be packed.
        """
        scored = []
        for group in self._of(plan, heads) if _eager(plan) else ():
            stack = self._stack(group, len(plan.heads) // 2)
            if stack is not None:
                scored.append(_Scored(group, stack, features(plan.heads[group.places[0]])))
        if _packs(scored, len(plan.heads), labels):
            return functools.partial(_in_order, [one.to_pack() for one in scored])
        outputs = {place: output for one in scored for place, output in one.outputs(labels)}
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


class _Scored:
    """A group of heads whose scores are there.

    Args:
        group: The group.
        stack: Its weights.
        features: What its heads see of the pass.
    """

    def __init__(self, group: _Group, stack: HeadStack, features: Features) -> None:
        first = group.structure.heads[0]
        self.group, self.sizes = group, stack.scores
        self.seen = first.view(features)
        self.scores = stack(first.read(self.seen))

    def outputs(self, labels: Sequence[Labels]) -> Iterator[tuple[int, Any]]:
        """The place and the output of each head.

        Args:
            labels: The labels of each head of the plan.
        """
        places, heads = self.group.places, self.group.structure.heads
        for place, head, own in zip(places, heads, split(self.scores, self.sizes), strict=True):
            yield place, head.finish(own, self.seen, **labels[place])

    def to_pack(self) -> _ToPack:
        """The same of heads that only pack their scores, without what the backbone has computed."""
        alike = {kind: head.finish(self.scores, self.seen) for kind, head in self.group.kinds}
        return _ToPack(self.group, self.scores, self.sizes, alike)


class _ToPack(NamedTuple):
    """Scores of a group of heads, and outputs like theirs by the class of the head."""

    group: _Group
    scores: Tensor
    sizes: Sequence[int]
    alike: Mapping[type[FeedForwardHead], Any]

    def outputs(self) -> Iterator[tuple[int, Any]]:
        """The place and the output of each head."""
        heads = self.group.structure.heads
        for place, head, own in zip(
            self.group.places, heads, split(self.scores, self.sizes), strict=True
        ):
            yield place, with_logits(self.alike[type(head)], own)


def _packs(scored: Sequence[_Scored], count: int, labels: Sequence[Labels]) -> bool:
    """Whether the scores of all heads are there, and need nothing but an output around them."""
    if sum(len(one.group.places) for one in scored) != count or any(labels):
        return False
    return all(one.group.kinds for one in scored)


def _in_order(parts: Sequence[_ToPack]) -> list[Any]:
    """The outputs of heads that only pack their scores, in the order of the plan."""
    outputs = {place: output for part in parts for place, output in part.outputs()}
    return [outputs[place] for place in range(len(outputs))]


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
