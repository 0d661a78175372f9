"""``with flexheads.active(model, ...)``: a setup for some calls, without touching the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from flexheads.composition import Setup, parse_composition
from flexheads.errors import UnsupportedError
from flexheads.models.adapters.mixin import AdapterModelMixin
from flexheads.plan import Plan
from flexheads.sites.chosen import Choice


class _Unchanged:
    def __repr__(self) -> str:
        return "UNCHANGED"


UNCHANGED: Any = _Unchanged()
"""Stands for the adapters that hold already."""


@contextmanager
def active(
    model: Any, setup: Setup = UNCHANGED, *, head: str | Sequence[str] | None = None
) -> Iterator[None]:
    """Chooses adapters and heads for the calls of a model inside a ``with`` block.

    Every call in the block that names neither runs as if they had been activated: calls of the
    model, of its ``generate`` and ``predict``, and of its backbone by itself. What a call names
    itself counts more. The model stays as it is, ``active_adapters`` and ``active_head`` included;
    other threads and asynchronous tasks do not see the choice, tasks that begin inside the block
    and ``asyncio.to_thread`` do. Blocks can stand inside each other.

    Args:
        model: A model with adapters.
        setup: The adapters as for `set_active_adapters`; None is no adapter. Left out, those that
            hold already.
        head: The head or heads; an empty list is none. None is, as for `set_active_adapters`, the
            head of the adapter's name, or else the one that holds already.

    Raises:
        UnknownNameError: If an adapter or a head does not exist; the block is not entered then.
        CompositionError: If the setup has no meaning.
        UnsupportedError: If the model has no adapters, or no heads that could be chosen.
    """
    if not isinstance(model, AdapterModelMixin):
        raise UnsupportedError(
            f"A {type(model).__name__} has no adapters to activate. Pass the model itself, not a "
            "wrapper around it, after flexheads.init(model)."
        )
    runtime = model._attachment.runtime
    around = runtime.chosen()  # read once: another thread may activate something meanwhile
    kept = setup is UNCHANGED
    block = around.setup if kept else parse_composition(setup)

    def resolve() -> Plan:
        if head is not None:
            heads = model._heads_named(head)
        else:
            heads = around.heads if kept else model._heads_for(block, around.heads)
        skip = around.skip_layers if kept else ()
        return model._kept_plan(block, heads, skip)

    choice = Choice(runtime, resolve)
    choice.enter()
    try:
        yield
    finally:
        choice.leave()
