"""One plan for all batches whose rows name some of many adapters of one kind."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from flexheads.composition import Block, Rows
from flexheads.plan import Plan
from flexheads.routing import Chain, Routing
from flexheads.sites.plan_cache import PlanCache

MOST = 512
"""Chains that one plan serves at most; with one more a new plan begins."""


def plan_for_rows(
    plans: PlanCache,
    block: Block,
    routing: Routing,
    skip_layers: tuple[int, ...],
    kind: Callable[[str], Hashable],
    make: Callable[[Block], Plan],
) -> Plan:
    """A plan whose operations serve rows with these chains, and perhaps with others.

    What sites do is settled once for a set of chains. Batches of a service name another set each
    time; so where nothing but banks run, which compute only with the chains that have rows, a plan
    grows by the adapters of the same kind that rows name.

    Args:
        plans: The plans that are kept.
        block: The setup.
        routing: Its routing.
        skip_layers: Numbers of layers in which nothing acts.
        kind: Equal for adapters of one configuration; gives None for one that stays by itself.
        make: Makes the plan of a setup.
    """
    chains = routing.chains
    plan = plans.get(("any rows", chains, skip_layers))
    if plan is not None:
        return plan
    family = None if len(chains) == 1 else _family(plans, chains, kind)
    wide = plans.wide.get((family, skip_layers)) if family is not None else None
    if wide is not None:
        known = wide.routing.chains
        if set(chains) <= set(known):
            return wide
        together = {*known, *chains}
        chains = tuple(sorted(together)) if len(together) <= MOST else chains
        block = Rows([chain[0] if chain else None for chain in chains])
    plan = make(block)
    plan = plans.keep(("any rows", plan.routing.chains, skip_layers), plan)
    if family is not None and all(getattr(op, "bank", None) for op in plan.ops.values()):
        plans.wide[family, skip_layers] = plan
    return plan


def _family(
    plans: PlanCache, chains: tuple[Chain, ...], kind: Callable[[str], Hashable]
) -> Hashable:
    """What chains of one adapter each, or of none, have in common; None where that is not all."""
    names = [chain[0] if len(chain) == 1 else None for chain in chains if chain]
    found = set()
    for name in names:
        if not isinstance(name, str):
            return None
        if name not in plans.kinds:
            plans.kinds[name] = kind(name)
        found.add(plans.kinds[name])
    return found.pop() if len(found) == 1 else None
