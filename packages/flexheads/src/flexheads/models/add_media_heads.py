"""``add_*_head``: heads for sound and images."""

from __future__ import annotations

from flexheads.models.head_methods import HeadsMixin


class AddMediaHeadsMixin(HeadsMixin):
    """One method for each type; `flexheads.models.add_heads.AddHeadsMixin` says what they share."""
