"""Adapters in AdapterHub files: keys, and the logical addresses that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flexheads.checkpoints.bundle import Layout

# Files of the first generation named the kind of adapter in the path.
_FIRST_GENERATION = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}


class AdapterNames:
    """Translates the tensors of one adapter into those of a file, and back.

    A key is the path of a site in the model, a word for the method (`infix`), the adapter's name,
    and a suffix. Subclasses say how their method's suffixes read, or translate tensors of which a
    file holds another form.

    Args:
        name: The adapter's name in the file.
        config: Its configuration, as plain data.
        layout: The model on the other side.
        old: Whether the file is older than the third generation.
    """

    infix = "flexheads_adapters"
    """The word between a site's path and the adapter's name."""

    def __init__(
        self, name: str, config: Mapping[str, Any], layout: Layout, *, old: bool = False
    ) -> None:
        self.name, self.config, self.layout, self.old = name, config, layout, old
        self.prefix = f"{layout.prefix}." if layout.prefix else ""

    def write(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, by key.

        Args:
            tensors: The adapter's tensors by logical address.
        """
        return {key: t for address, t in tensors.items() for key in self.keys(address)}

    def read(self, raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The adapter's tensors by logical address, and the keys that have no place.

        Args:
            raw: The tensors of a file by key.
        """
        tensors, unexpected = {}, []
        for key, tensor in raw.items():
            address = self.address(key)
            if address is None:
                unexpected.append(key)
            elif address:
                tensors[address] = tensor
        return tensors, unexpected

    # --- one tensor -----------------------------------------------------------------------------

    def keys(self, address: str) -> list[str]:
        """The keys that hold the tensor at an address; some are written twice."""
        if address.startswith("shared."):
            return [f"{self.prefix}shared_parameters.{self.name}.{address.split('.', 2)[2]}"]
        site = self.site(address)
        stem = f"{self.prefix}{self.layout.paths[site]}.{self.infix}.{self.name}."
        return [stem + word for word in self.suffixes(site, address[len(site) + 1 :])]

    def address(self, key: str) -> str | None:
        """The address of a key; empty where it repeats another, None where it has no place."""
        key = self.modern(key)
        stem = f"shared_parameters.{self.name}."
        if key.startswith(stem):
            return self.shared_address(key[len(stem) :])
        path, found, rest = key.partition(f".{self.infix}.{self.name}.")
        for site in self.layout.sites.get(path, ()) if found else ():
            suffix = self.own_suffix(site, rest)
            if suffix is not None:
                return f"{site}.{suffix}" if suffix else suffix
        return None

    def suffixes(self, site: str, suffix: str) -> list[str]:
        """What a file calls a part's tensor at a site."""
        return [self._told_apart(site) + suffix]

    def own_suffix(self, site: str, suffix: str) -> str | None:
        """The inverse of `suffixes`; empty where it repeats another, None where it is unknown."""
        mark = self._told_apart(site)
        return suffix[len(mark) :] if suffix.startswith(mark) else None

    def shared_address(self, suffix: str) -> str | None:
        """The address of a tensor that several sites share."""
        return None

    def _told_apart(self, site: str) -> str:
        """The site's role, where several projections of one fused module share a path."""
        shared = len(self.layout.sites[self.layout.paths[site]]) > 1
        return f"{site.rpartition('.')[2]}." if shared else ""

    # --- for subclasses ---------------------------------------------------------------------------

    def site(self, address: str) -> str:
        """The site that a tensor's address belongs to."""
        return self.layout.site_of(address)

    def modern(self, key: str) -> str:
        """A key without the backbone's prefix, in the words of the third generation."""
        key = self.layout.below(key)
        if self.old:
            for before, after in _FIRST_GENERATION.items():
                key = key.replace(f"{before}.{self.name}.", f"{after}.{self.name}.")
        return key
