"""Low-rank adaptation in AdapterHub files."""

from __future__ import annotations

from flexheads.checkpoints.hub.names import AdapterNames


class LoRANames(AdapterNames):
    """The parts' own names are those of the files."""

    infix = "loras"
