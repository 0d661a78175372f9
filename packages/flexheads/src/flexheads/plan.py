"""The plan: what one forward call does, resolved once from a composition and the heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexheads.composition import Block
from flexheads.routing import Routing


@dataclass(frozen=True)
class HeadRoute:
    """One head of a plan and the chain whose rows it sees.

    Attributes:
        head: The head's name.
        chain: Number of the chain in the routing; None means every row.
        routing: The routing that the chain is one of, where rows have heads of their own; None is
            that of the adapters, `Plan.routing`.
    """

    head: str
    chain: int | None = None
    routing: Routing | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """What one call does: immutable, shared between calls and threads.

    Attributes:
        setup: The composition of adapters, or None.
        routing: The rows that follow each chain.
        heads: The heads that run, in the order of their outputs.
        ops: For each site that takes part, by its logical address, what it does.
        skip_layers: Numbers of layers in which nothing acts.
        rows: What cuts a batch by the rows of one call (a `flexheads.sites.rows.RowMap`), for
            operations that serve any rows; None where there are none.
        repeat_at: The layer before which rows are repeated for `Parallel`, whose branches are alike
            in all layers before; None where that is done with the inputs of the model.
        copies: How many equal copies of the batch a generation begins with, made before the call.
    """

    setup: Block | None = None
    routing: Routing = field(default_factory=Routing)
    heads: tuple[HeadRoute, ...] = ()
    ops: Mapping[str, Any] = field(default_factory=dict)
    skip_layers: tuple[int, ...] = ()
    rows: Any = None
    repeat_at: int | None = None
    copies: int = 1

    def rows_of(self, route: HeadRoute, batch: int) -> list[int] | slice | None:
        """The rows that a head sees in a batch of `batch` rows (already repeated); None is all.

        Raises:
            CompositionError: If the batch does not have the rows that the plan names.
        """
        routing = route.routing or self.routing
        if route.chain is None or routing.single:
            return None
        return routing.rows(batch)[route.chain]
