"""CLIP for flexheads: its towers, each alone or both, with adapters and heads."""

from __future__ import annotations

from typing import Any

__all__ = ["CLIPModelWithHeads", "CLIPTextModelWithHeads", "CLIPVisionModelWithHeads"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from flexheads.models.with_heads import with_heads_class

        return with_heads_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
