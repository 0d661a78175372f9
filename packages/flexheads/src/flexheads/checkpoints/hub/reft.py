"""Representation fine-tuning in AdapterHub files."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flexheads.checkpoints.hub.names import AdapterNames
from flexheads.methods.householder import orthonormal_rows, reflections, signs

_OURS = ".projection.weight"
_ORIGINAL = ".projection.parametrizations.weight.original"
_BASE = ".projection.parametrizations.weight.0.base"


class ReftNames(AdapterNames):
    """Orthonormal projections are parametrised in files as torch does it.

    There a projection is what `flexheads.methods.householder.orthonormal_rows` makes of an
    "original", turned by an orthogonal "base" of hidden size squared. Ours has no base, so the base
    is written as the identity, and read into the original where it is another.
    """

    infix = "reft_layer.refts"

    def write(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        written = super().write(tensors)
        for key in [key for key in written if key.endswith(_ORIGINAL)]:
            original = written[key].clone()
            # torch takes the diagonal's whole part where we take its sign.
            original.diagonal().copy_(signs(original))
            written[key] = original
            base = torch.eye(original.shape[1], dtype=original.dtype, device=original.device)
            written[key.removesuffix(_ORIGINAL) + _BASE] = base
        return written

    def read(self, raw: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        if not self.config.get("orthogonality"):
            return super().read(raw)
        plain = dict(raw)
        for key in [key for key in raw if key.endswith(_ORIGINAL)]:
            base = plain.pop(key.removesuffix(_ORIGINAL) + _BASE, None)
            if base is not None:
                plain[key] = _without(base, raw[key])
        return super().read(plain)

    def suffixes(self, site: str, suffix: str) -> list[str]:
        if self.config.get("orthogonality") and suffix.endswith(_OURS):
            return [suffix.removesuffix(_OURS) + _ORIGINAL]
        return [suffix]

    def own_suffix(self, site: str, suffix: str) -> str | None:
        if self.config.get("orthogonality") and suffix.endswith(_ORIGINAL):
            return suffix.removesuffix(_ORIGINAL) + _OURS
        return suffix


def _without(base: Tensor, original: Tensor) -> Tensor:
    """The original that gives the same projection with the identity as its base."""
    if torch.equal(base, torch.eye(base.shape[0], dtype=base.dtype, device=base.device)):
        return original
    rows = orthonormal_rows(original) @ base.mT.to(torch.promote_types(base.dtype, torch.float32))
    return reflections(rows).to(original.dtype)
