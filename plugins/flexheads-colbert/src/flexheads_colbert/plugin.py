"""What this package registers: one head type."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import HeadTypeSpec, hookimpl


@hookimpl
def flexheads_register_head_types() -> Iterable[HeadTypeSpec]:
    """Late interaction."""
    return [
        HeadTypeSpec(
            name="late_interaction",
            head="flexheads_colbert.late_interaction:LateInteractionHead",
            description="One vector per token; texts are compared token by token",
        )
    ]
