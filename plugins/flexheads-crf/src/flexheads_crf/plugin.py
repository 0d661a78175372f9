"""What this package registers: one head type."""

from __future__ import annotations

from collections.abc import Iterable

from flexheads import HeadTypeSpec, hookimpl


@hookimpl
def flexheads_register_head_types() -> Iterable[HeadTypeSpec]:
    """Tagging with a conditional random field."""
    return [
        HeadTypeSpec(
            name="crf_tagging",
            head="flexheads_crf.tagging:CRFTaggingHead",
            description="One label per token, the best sequence of labels as a whole",
        )
    ]
