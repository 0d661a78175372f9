"""Folding an adapter into the backbone's weights, and taking it out again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flexheads.errors import UnsupportedError
from flexheads.methods.base import Adapter
from flexheads.models.base import TransformersModel
from flexheads.models.container import NamedModules
from flexheads.sites.attach import Attachment

_Original = tuple[Any, Tensor, Tensor | None]
"""What weights are of (a projection, a norm, an embedding), and what they were before merging."""


class MergingMixin(TransformersModel):
    """``merge_adapter`` and ``reset_adapter``.

    Attributes:
        adapters: The adapters by name.
    """

    adapters: NamedModules[Adapter]
    _attachment: Attachment
    _merged: dict[str, list[_Original]]

    def merge_adapter(self, adapter_name: str) -> None:
        """Folds an adapter into the weights it acts on; `reset_adapter` takes it out again.

        The original weights are kept aside, so that they come back bit for bit. If anything is
        in the way, nothing is changed.

        Raises:
            UnknownNameError: If there is none of that name.
            UnsupportedError: If the method cannot be folded in, an adapter is merged already, or
                the model is in training mode.
        """
        adapter = self.adapters[adapter_name]
        if self._merged:
            raise UnsupportedError(
                f"{next(iter(self._merged))!r} is merged already; call reset_adapter() first."
            )
        if self.training:
            raise UnsupportedError(
                f"The model is in training mode, but a merged adapter learns nothing. Call eval() "
                f"before merging {adapter_name!r}."
            )
        with torch.no_grad():
            folded = [
                (host, *adapter.method.merged(part, host.weight, host.bias))
                for part, host in self._hosts(adapter)
            ]
            kept: list[_Original] = [(host, *host.kept()) for host, _, _ in folded]
            for host, weight, bias in folded:
                host.write(weight, bias)
        self._merged[adapter_name] = kept
        self._changed()

    def _hosts(self, adapter: Adapter) -> list[tuple[nn.Module, Any]]:
        """Each part of an adapter, and what it is folded into.

        Raises:
            UnsupportedError: If a part acts where there are no weights that could take it.
        """
        pairs = []
        for address, part in adapter.parts.items():
            host: Any = getattr(self._attachment.sites[address], "projection", None)
            if host is None:
                raise UnsupportedError(
                    f"Adapter {adapter.name!r} cannot be merged: a {type(part).__name__} acts at "
                    f"{address}, where the backbone has no weights that could take it."
                )
            host.check_writable()
            pairs.append((part, host))
        return pairs

    def reset_adapter(self) -> None:
        """Takes a merged adapter out of the weights again, bit for bit."""
        for kept in self._merged.values():
            for host, weight, bias in reversed(kept):
                host.restore(weight, bias)
        self._merged.clear()
        self._changed()

    def _changed(self) -> None:
        """Brings what is derived from adapters up to date."""
        raise NotImplementedError
