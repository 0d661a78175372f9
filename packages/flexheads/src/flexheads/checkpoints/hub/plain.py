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

    def suffixes(self, site: str, suffix: str) -> list[str]:
        return [self._mark(site) + suffix]

    def own_suffix(self, site: str, suffix: str) -> str | None:
        mark = self._mark(site)
        return suffix[len(mark) :] if suffix.startswith(mark) else None

    def shared_address(self, suffix: str) -> str | None:
        return _SHARED + suffix

    def _mark(self, site: str) -> str:
        paths = self.layout.paths
        alone = sum(path == paths[site] for path in paths.values()) == 1
        return "" if alone else f"{site.rpartition('.')[2]}."
