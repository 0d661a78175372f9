"""From a setup to a plan: what each site does with the parts of the adapters that it names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from flexheads.composition import Block, Fuse
from flexheads.errors import UnsupportedError
from flexheads.plan import HeadRoute, Plan
from flexheads.routing import Chain, Routing, Step, chain_of, route
from flexheads.sites.bank_calls import look_at_banks_together
from flexheads.sites.base import AttachedSite
from flexheads.sites.combine import combine
from flexheads.sites.prompt import PROMPT
from flexheads.sites.prompts import PromptOp
from flexheads.sites.repeat import Repeater
from flexheads.sites.rows import KnownRows, row_map

Parts = Mapping[str, Mapping[str, nn.Module]]
"""The parts of adapters, or fusions: by name, then by address."""


class Planner:
    """Makes plans for one model.

    Args:
        sites: Its sites by address.
        norms: For residual sites before a norm that is a site too, that one's address.
        repeater: Repeats rows for `Parallel` inside of the backbone.
    """

    def __init__(
        self, sites: Mapping[str, AttachedSite], norms: Mapping[str, str], repeater: Repeater
    ) -> None:
        self.sites, self.norms, self.repeater = sites, norms, repeater

    def plan(
        self,
        setup: Block | None,
        adapters: Parts,
        heads: tuple[HeadRoute, ...] = (),
        fusions: Parts | None = None,
        skip_layers: Sequence[int] = (),
    ) -> Plan:
        """The plan for a setup.

        Args:
            setup: The composition.
            adapters: The parts of every adapter that the setup names.
            heads: The heads that run.
            fusions: The parts of every AdapterFusion that the setup names.
            skip_layers: Numbers of layers in which nothing acts.

        Raises:
            CompositionError: If a block has no meaning for the adapters inside.
        """
        routing = route(setup)
        rows = row_map(routing, self.repeater.runtime)
        known = dict.fromkeys(address for name in adapters for address in adapters[name])
        sites = [s for s in map(self.sites.__getitem__, known) if s.layer not in skip_layers]
        repeat_at = self._repeat_at(routing, sites, adapters)
        ops: dict[str, Any] = {}
        for site in sites:
            chains, own_rows = routing.chains, rows
            if repeat_at is not None and (site.layer is None or site.layer < repeat_at):
                # One for all rows. Heads ask sites outside of layers for the parts of a chain.
                chains, own_rows = chains[: None if site.layer is None else 1], None
            parts = [_assemble(chain, site, adapters, fusions or {}) for chain in chains]
            if any(parts):
                ops[site.address] = site.op(parts, own_rows)
        look_at_banks_together(ops.items(), self.repeater.runtime)
        for address, norm in self.norms.items():
            if address in ops and norm in ops:
                ops[address] = ops[address]._replace(norms=ops[norm].chains)
        _refuse_filling(ops.get(PROMPT), routing.chains, adapters)
        named = None if routing.index is None else KnownRows(routing)
        return Plan(setup, routing, heads, ops, tuple(skip_layers), named, repeat_at)

    def _repeat_at(
        self, routing: Routing, sites: Iterable[AttachedSite], adapters: Parts
    ) -> int | None:
        """The first layer in which the branches of `Parallel` differ, see `Plan.repeat_at`."""
        if routing.repeat == 1 or routing.repeat != len(routing.chains):
            return None
        differing = (
            site.layer or 0
            for site in sites
            if len({_acting(chain, site.address, adapters) for chain in routing.chains}) > 1
        )
        layer = min(differing, default=0)
        return layer if self.repeater.can_begin(layer) else None


def _refuse_filling(op: PromptOp | None, chains: Sequence[Chain], adapters: Parts) -> None:
    """Refuses gates in rows that are filled up because others have longer prompts.

    Raises:
        UnsupportedError: If there are any; a gate is a mean over all positions of a row.
    """
    padded = [] if op is None else [n for n, own in enumerate(op.layouts) if own.padding]
    for step in (step for number in padded for step in chains[number]):
        for name in (step,) if isinstance(step, str) else step.names():
            if any(getattr(part, "gate", None) is not None for part in adapters[name].values()):
                raise UnsupportedError(
                    f"Adapter {name!r} has gates, which are means over a whole sequence, so its "
                    "rows need prompts as long as those of all other rows in the batch. Run them "
                    "in separate batches."
                )


def _acting(chain: Chain, address: str, adapters: Parts) -> Chain:
    """The steps of a chain that act at a site."""

    def acts(step: Step) -> bool:
        names = (step,) if isinstance(step, str) else step.names()
        return any(address in adapters[name] for name in names)

    return tuple(step for step in chain if acts(step))


def _assemble(chain: Chain, site: AttachedSite, adapters: Parts, fusions: Parts) -> list[Any]:
    """The parts of a chain at one site, in order."""
    parts: list[Any] = []
    for step in chain:
        if isinstance(step, str):
            if site.address in adapters[step]:
                parts.append(adapters[step][site.address])
            continue
        branches = [_assemble(chain_of(child), site, adapters, fusions) for child in step]
        if any(branches):
            own = fusions.get(step.name, {}) if isinstance(step, Fuse) else {}
            parts.append(combine(site, step, branches, own.get(site.address)))
    return parts
