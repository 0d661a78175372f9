"""Prefix tuning in AdapterHub files."""

from __future__ import annotations

import re

from flexheads.checkpoints.hub.names import AdapterNames

_POOL = "prefix_tuning.prefix_tunings"
_SHARED, _GATE = "shared.", "gate."


class PrefixTuningNames(AdapterNames):
    """Pools lie beside the layers, gates at the attention modules.

    The `adapters` library repeats every pool once for each attention module. One copy is enough for
    it to read, and for us, so one is written.
    """

    infix = "prefix_tuning.prefix_gates"

    def keys(self, address: str) -> list[str]:
        if address.startswith(_SHARED):
            return [f"{self.prefix}{_POOL}.{self.name}.{address.removeprefix(_SHARED)}"]
        return super().keys(address)

    def address(self, key: str) -> str | None:
        modern = self.modern(key)
        pattern = r"(?:(?P<path>.+)\.)?prefix_tuning\.(?:pool\.)?prefix_tunings\.(?P<rest>.+)"
        match = re.fullmatch(pattern, modern)
        stem = f"{self.name}."
        if match is not None and match["rest"].startswith(stem):
            known = match["path"] is None or match["path"] in self.layout.paths.values()
            return f"{_SHARED}{match['rest'][len(stem) :]}" if known else None
        return super().address(key)

    def suffixes(self, site: str, suffix: str) -> list[str]:
        return [suffix.removeprefix(_GATE)]

    def own_suffix(self, site: str, suffix: str) -> str | None:
        return f"{_GATE}{suffix}" if suffix in ("weight", "bias") else None
