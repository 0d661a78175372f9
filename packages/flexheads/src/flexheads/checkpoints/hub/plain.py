"""Adapters of methods that the `adapters` library does not have, in files of its layout."""

from __future__ import annotations

from flexheads.checkpoints.hub.names import AdapterNames

_SHARED = "shared."


class PlainNames(AdapterNames):
    """The parts' own names, behind the role of their site where several sites are one module."""

    def keys(self, address: str) -> list[str]:
        if address.startswith(_SHARED):
            own = address[len(_SHARED) :]
            return [f"{self.prefix}shared_parameters.{self.name}.{own}"]
        return super().keys(address)

    def shared_address(self, suffix: str) -> str | None:
        return _SHARED + suffix
