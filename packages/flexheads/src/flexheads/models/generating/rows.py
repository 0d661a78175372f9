"""Rows of a generation: the plan that they follow when beams and branches repeat them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput

from flexheads.composition import BatchSplit, Block, Setup, Stack
from flexheads.errors import UnsupportedError
from flexheads.heads.base import PredictionHead
from flexheads.heads.language_modeling import LanguageModelHead
from flexheads.heads.outputs import head_output
from flexheads.models.calls.inputs import batch_size, repeat_rows
from flexheads.models.container import NamedModules
from flexheads.plan import HeadRoute, Plan
from flexheads.routing import Chain, Routing
from flexheads.sites.rows import KnownRows

_ADDED = ("cache_position",)
"""What transformers hands to each step by itself, in releases before 5."""


@dataclasses.dataclass(frozen=True, eq=False)
class GenerationPlan(Plan):
    """The plan of a whole generation, which repeats rows for beams and returned sequences.

    Attributes:
        named: How many rows it names; None where it holds for any number.
        expanded: The plan in which each row stands so many times, one behind the other.
    """

    named: int | None = None
    expanded: Callable[[int], GenerationPlan] | None = None

    def check_rows(self, rows: int | None) -> None:
        """Refuses a batch that the plan is not for, before rows are repeated.

        Raises:
            CompositionError: If so.
        """
        for routing in (self.routing, *(route.routing for route in self.heads)):
            if rows is not None and routing is not None and not routing.single:
                routing.rows(rows)

    def for_rows(self, rows: int) -> GenerationPlan:
        """The plan for a batch of `rows` rows; this one where it names them, or cannot fit."""
        named = self.named
        if self.expanded is None or not named or rows == named or rows % named:
            return self
        return self.expanded(rows // named)


def joined(outputs: Sequence[tuple[HeadRoute, Any]], plan: Plan, backbone: Any) -> Any:
    """One output with the scores of every row in the order of the batch.

    Args:
        outputs: The output of each head, for the rows of its chain.
        plan: The plan of the call.
        backbone: The backbone's output.
    """
    route, first = outputs[0]
    if len(outputs) == 1 and sees_all(route, plan):
        return first
    parts = [output.logits for _, output in sorted(outputs, key=lambda pair: pair[0].chain or 0)]
    logits = KnownRows(route.routing or plan.routing).merge(parts)
    return head_output(type(first), backbone, loss=None, logits=logits)


def keeping(
    positions: int | Tensor,
    labels: Sequence[Mapping[str, Any]],
    plan: Plan,
    heads: NamedModules[PredictionHead],
) -> list[Mapping[str, Any]]:
    """The labels of each head, and for language-model heads the positions that are asked for.

    Args:
        positions: How many of the last, or which; 0 is all.
        labels: The labels of each head of the plan.
        plan: The plan of the call.
        heads: The model's heads.
    """
    if isinstance(positions, int) and not positions:
        return list(labels)
    scoring = [isinstance(heads[route.head], LanguageModelHead) for route in plan.heads]
    return [
        {**given, "logits_to_keep": positions} if scores else given
        for given, scores in zip(labels, scoring, strict=True)
    ]


def step_of(
    plan: Plan, names: Sequence[str], inputs: dict[str, Any]
) -> tuple[Plan, dict[str, Any]]:
    """The plan of one call, and its inputs without those that only some classes know.

    Args:
        plan: The plan in force; one of a generation names fewer rows than its calls may have.
        names: The arguments of the backbone's forward.
        inputs: The inputs, some of which transformers adds in a generation.
    """
    if not isinstance(plan, GenerationPlan):
        return plan, inputs
    unknown = () if "kwargs" in names else set(_ADDED) - set(names)
    known = {name: value for name, value in inputs.items() if name not in unknown}
    return plan.for_rows(batch_size(known)), known


def sees_all(route: HeadRoute, plan: Plan) -> bool:
    """Whether a head sees every row."""
    return route.chain is None or (route.routing or plan.routing).single


def rows_without(routes: Sequence[HeadRoute], plan: Plan) -> str:
    """The rows that none of the heads sees, as words; empty where each is seen."""
    if not routes:
        return "the batch"
    routing = routes[0].routing or plan.routing
    left = set(range(len(routing.chains))) - {route.chain for route in routes}
    if routing.index is not None:
        left &= set(routing.index)
        return f"rows {[r for r, chain in enumerate(routing.index) if chain in left]}" * bool(left)
    return f"the rows of {[routing.chains[chain] for chain in sorted(left)]}" * bool(left)


def rows_named(plan: Plan) -> int | None:
    """How many rows a plan names; None where it holds for any number."""
    for routing in (plan.routing, *(route.routing for route in plan.heads)):
        if routing is not None and routing.index is not None:
            return len(routing.index)
        if routing is not None and routing.sizes is not None and not routing.single:
            return sum(routing.sizes)
    return None


def as_generation(plan: Plan, **changes: Any) -> GenerationPlan:
    """A plan as that of a generation, with fields that differ."""
    fields = {field.name: getattr(plan, field.name) for field in dataclasses.fields(Plan)}
    return GenerationPlan(**{**fields, **changes})


def repeat_setup(setup: Block | None, routing: Routing, times: int) -> Block | None:
    """A setup that shares out rows, where each row stands so many times; chains stay in order."""
    if routing.sizes is None or routing.single:
        return setup
    blocks = [_block_of(chain) for chain in routing.chains]
    return BatchSplit(*blocks, batch_sizes=[size * times for size in routing.sizes])


def _block_of(chain: Chain) -> Setup:
    return Stack(*chain) if chain else None


def repeat_route(route: HeadRoute, times: int) -> HeadRoute:
    """The route of a head where each row stands so many times."""
    own = route.routing
    return route if own is None else dataclasses.replace(route, routing=own.repeated(times))


def rows_in(inputs: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """Rows of the inputs of a generation, or None where it begins from nothing."""
    for name in (*names, "input_ids", "inputs_embeds"):
        if isinstance(value := inputs.get(name), Tensor):
            return int(value.shape[0])
    encoded = inputs.get("encoder_outputs")
    return batch_size(encoded) if isinstance(encoded, ModelOutput) else None


def repeated(inputs: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The inputs of a generation for each branch of `Parallel`.

    Raises:
        UnsupportedError: If they hold a cache, whose rows are not repeated.
    """
    if inputs.get("past_key_values") is not None:
        raise UnsupportedError(
            f"{plan.setup!r} repeats the batch, but not what past_key_values holds. Begin without "
            "a cache, or name the rows with Rows."
        )
    return repeat_rows(inputs, plan.routing.repeat)
