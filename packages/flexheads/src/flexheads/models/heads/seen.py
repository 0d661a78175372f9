"""What a head sees of a pass: the rows of its chain, and what was done to their embeddings."""

from __future__ import annotations

import functools
from typing import Any

from flexheads.heads.features import Features
from flexheads.models.calls.inputs import among
from flexheads.plan import HeadRoute, Plan
from flexheads.sites.attach import EMBEDDINGS, LATE_EMBEDDINGS, TOKENS
from flexheads.sites.embedding import undo_in_turn


def features_of(
    features: Features, plan: Plan, route: HeadRoute, rows: list[int] | slice
) -> Features:
    """The features of the rows that a head sees."""
    tokens, mixed = plan.ops.get(TOKENS), route.routing is not None and not plan.routing.single
    if not mixed:
        chain = route.chain if route.routing is None else None
        own = tokens if tokens is None or chain is None else tokens.for_chain(chain)
        undo, rescore = undoing(plan, chain), None if own is None else own.scores
    else:  # rows of one head that follow several chains
        batch = features.hidden.shape[0]
        undo = among(undoing(plan), rows, batch)
        rescore = among(None if tokens is None else tokens.scores, rows, batch)
    return features.select(lambda t: t[rows], undo, rescore)


def undoing(plan: Plan, chain: int | None = None) -> Any:
    """The inverse of the invertible adapters, of all rows or those of one chain; None without."""
    ops = [plan.ops[a] for a in (EMBEDDINGS, LATE_EMBEDDINGS) if a in plan.ops]
    if chain is not None:
        ops = [op.for_chain(chain) for op in ops]
    return functools.partial(undo_in_turn, ops) if ops else None
