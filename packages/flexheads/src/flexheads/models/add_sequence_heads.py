"""``add_*_head``: heads that score or embed a whole sequence."""

from __future__ import annotations

from flexheads.models.head_methods import HeadsMixin


class AddSequenceHeadsMixin(HeadsMixin):
    """One method for each type; `flexheads.models.add_heads.AddHeadsMixin` says what they share."""
