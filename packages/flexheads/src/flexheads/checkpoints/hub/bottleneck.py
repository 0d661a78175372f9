"""Bottleneck adapters, and the invertible ones that come with them, in AdapterHub files."""

from __future__ import annotations

from flexheads.checkpoints.hub.names import AdapterNames

_EMBEDDINGS = "embeddings"
_WORDS = {"up": "adapter_up", "norm_before": "adapter_norm_before"}
_WORDS |= {"norm_after": "adapter_norm_after", "gate": "gate", "scaling": "scaling"}


class BottleneckNames(AdapterNames):
    """The down-projection is numbered in a sequence; a norm before it is written twice."""

    infix = "adapters"

    def keys(self, address: str) -> list[str]:
        if address.startswith(f"{_EMBEDDINGS}."):
            suffix = address.removeprefix(f"{_EMBEDDINGS}.")
            return [f"{self.prefix}invertible_adapters.{self.name}.{suffix}"]
        return super().keys(address)

    def address(self, key: str) -> str | None:
        stem = f"invertible_adapters.{self.name}."
        modern = self.modern(key)
        if modern.startswith(stem) and _EMBEDDINGS in self.layout.paths:
            return f"{_EMBEDDINGS}.{modern[len(stem) :]}"
        return super().address(key)

    def suffixes(self, site: str, suffix: str) -> list[str]:
        module, dot, parameter = suffix.partition(".")
        if module == "down":
            return [f"{self._down}.{parameter}"]
        words = [f"{_WORDS[module]}{dot}{parameter}"]
        if module == "norm_before":
            words.append(f"adapter_down.0.{parameter}")
        return words

    def own_suffix(self, site: str, suffix: str) -> str | None:
        if suffix.startswith(f"{self._down}."):
            return f"down.{suffix[len(self._down) + 1 :]}"
        if self.config.get("ln_before") and suffix.startswith("adapter_down.0."):
            return ""
        for module, word in _WORDS.items():
            if suffix == word or suffix.startswith(f"{word}."):
                return module + suffix[len(word) :]
        return None

    @property
    def _down(self) -> str:
        return "adapter_down.1" if self.config.get("ln_before") else "adapter_down.0"
