"""Compositions in AdapterHub files."""

from __future__ import annotations

from typing import Any

from flexheads.composition import Average, BatchSplit, Block, Child, Fuse, Split, from_json

_SIZES = {"BatchSplit": "batch_sizes", "Split": "splits", "Average": "weights"}


def hub_setup(setup: Child) -> Any:
    """A setup in the words of the `adapters` library."""
    if setup is None:
        return None
    if isinstance(setup, str):
        return {"type": "single", "children": [setup]}
    described: dict[str, Any] = {
        "type": type(setup).__name__,
        "children": [hub_setup(child) for child in setup],
    }
    if isinstance(setup, (BatchSplit, Split, Average)):
        field = _SIZES[type(setup).__name__]
        described["kwargs"] = {field: list(getattr(setup, field))}
    if isinstance(setup, Fuse) and setup.name != ",".join(setup.members()):
        described["kwargs"] = {"name": setup.name}
    return described


def setup_from_hub(described: Any) -> Block | None:
    """The setup that such words describe.

    Raises:
        CompositionError: If they name a block that does not exist.
    """
    return from_json(_own(described)) if isinstance(described, dict) else None


def _own(described: dict[str, Any] | None) -> Any:
    """The same in the words of `flexheads.composition.to_json`."""
    if described is None:
        return None
    if described["type"] == "single":
        return described["children"][0]
    children = [_own(child) for child in described["children"]]
    return {**described, **described.get("kwargs", {}), "children": children}
