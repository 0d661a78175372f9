"""Swin for flexheads: `SwinModelWithHeads`, adapter sites, and conversions of its static heads."""

from __future__ import annotations

from typing import Any

__all__ = ["SwinModelWithHeads"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from flexheads.models.with_heads import with_heads_class

        return with_heads_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
