"""Tagging with a linear-chain conditional random field, as a prediction head for flexheads."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "CRFTaggingConfig": "flexheads_crf.tagging",
    "CRFTaggingHead": "flexheads_crf.tagging",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
