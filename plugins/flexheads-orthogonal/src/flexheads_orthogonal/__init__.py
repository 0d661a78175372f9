"""Orthogonal fine-tuning (OFT) and its butterfly variant (BOFT) for flexheads."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "BOFTConfig": "flexheads_orthogonal.boft",
    "OFTConfig": "flexheads_orthogonal.oft",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
