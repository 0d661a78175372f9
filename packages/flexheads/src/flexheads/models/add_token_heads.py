"""``add_*_head``: heads that read tokens."""

from __future__ import annotations

from flexheads.models.head_methods import HeadsMixin


class AddTokenHeadsMixin(HeadsMixin):
    """One method for each type; `flexheads.models.add_heads.AddHeadsMixin` says what they share."""
