"""Late interaction (ColBERT): one vector per token, as a prediction head for flexheads."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "LateInteractionConfig": "flexheads_colbert.late_interaction",
    "LateInteractionHead": "flexheads_colbert.late_interaction",
    "LateInteractionOutput": "flexheads_colbert.late_interaction",
    "max_sim": "flexheads_colbert.late_interaction",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
