"""Bottleneck adapters, and the invertible ones that come with them, in AdapterHub files."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flexheads.checkpoints.hub.names import AdapterNames
from flexheads.errors import CheckpointError

_WORDS = {"up": "adapter_up", "norm_before": "adapter_norm_before"}
_WORDS |= {"norm_after": "adapter_norm_after", "gate": "gate", "scaling": "scaling"}


class BottleneckNames(AdapterNames):
    """The down-projection is numbered in a sequence; a norm before it is written twice."""

    infix = "adapters"

    def keys(self, address: str) -> list[str]:
        if address.startswith(f"{self._embeddings}."):
            suffix = address.removeprefix(f"{self._embeddings}.")
            return [f"{self.prefix}{self._couplings}{suffix}"]
        return super().keys(address)

    def address(self, key: str) -> str | None:
        modern = self.modern(key)
        if self._embeddings in self.layout.paths and modern.startswith(stem := self._couplings):
            return f"{self._embeddings}.{modern[len(stem) :]}"
        if self.old and modern.startswith(f"invertible_adapters.{self.name}."):
            return ""  # those of an encoder hung at the backbone too
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

    def read(self, raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        tensors, unexpected = super().read(raw)
        shares = self.config.get("shared_phm_rule", True) or self.config.get("shared_W_phm")
        if self.config.get("phm_layer") and shares and not _shared(tensors):
            raise CheckpointError(
                f"Adapter {self.name!r} is a compacter, but the file lacks the tensors that its "
                "layers share. Releases of the adapters library before 1.3.0 did not save them, "
                "nor does 1.3.0 from a model without a head, so they are lost; save the adapter "
                "again from the model that it was trained in, with a head."
            )
        return tensors, unexpected

    def shared_address(self, suffix: str) -> str | None:
        return f"shared.phm.{suffix}" if self.config.get("phm_layer") else None

    @property
    def _embeddings(self) -> str:
        """The address of its invertible adapter."""
        late = self.config.get("inv_adapter_late") and "late_embeddings" in self.layout.paths
        return "late_embeddings" if late else "embeddings"

    @property
    def _couplings(self) -> str:
        """What the keys of an invertible adapter begin with, below the backbone."""
        holder = self.layout.paths[self._embeddings]
        return f"{holder}{'.' if holder else ''}invertible_adapters.{self.name}."

    @property
    def _down(self) -> str:
        return "adapter_down.1" if self.config.get("ln_before") else "adapter_down.0"


def _shared(tensors: Mapping[str, Tensor]) -> bool:
    return any(address.startswith("shared.") for address in tensors)
