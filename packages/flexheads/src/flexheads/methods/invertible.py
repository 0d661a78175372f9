"""Invertible adapters: coupling blocks behind the embeddings, undone before a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flexheads.activations import activation
from flexheads.errors import ConfigError
from flexheads.methods.base import lacking, seeded
from flexheads.sites.base import AttachedSite
from flexheads.sites.embedding import EmbeddingPart

if TYPE_CHECKING:
    from flexheads.methods.bottleneck_config import BnConfig


class NiceCoupling(EmbeddingPart):
    """An additive coupling block (NICE, Dinh et al. 2015, arXiv:1410.8516, equation 7).

    ``y1 = x1 + F(x2)`` and ``y2 = x2 + G(y1)``, over two halves of the hidden size. It starts as
    the identity, because F and G end in zeros; in the `adapters` library only near it.

    Args:
        width: Hidden size.
        non_linearity: Activation inside F and G.
        reduction_factor: Half the hidden size over the inner size of F and G.
    """

    def __init__(self, width: int, non_linearity: str, reduction_factor: float) -> None:
        super().__init__()
        self.left = width // 2
        right = width - self.left
        self.F = _subnet(right, self.left, non_linearity, reduction_factor)
        self.G = _subnet(self.left, right, non_linearity, reduction_factor)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``(batch, sequence, width)`` to the same."""
        x1, x2 = hidden[..., : self.left], hidden[..., self.left :]
        y1 = x1 + self.F(x2)
        return torch.cat([y1, x2 + self.G(y1)], dim=-1)

    def inverse(self, hidden: Tensor) -> Tensor:
        """Undoes `forward`."""
        y1, y2 = hidden[..., : self.left], hidden[..., self.left :]
        x2 = y2 - self.G(y1)
        return torch.cat([y1 - self.F(x2), x2], dim=-1)


class GlowCoupling(EmbeddingPart):
    """Affine coupling in both halves (Glow, Kingma and Dhariwal 2018, arXiv:1807.03039).

    ``y1 = e(s2) * x1 + t2`` with ``s2, t2 = S2(x2)``, then ``y2 = e(s1) * x2 + t1`` with
    ``s1, t1 = S1(y1)``; ``e(s) = exp(c * 0.636 * atan(s / c))`` with ``c = 5`` keeps every factor
    between about ``exp(-c)`` and ``exp(c)``. It starts as the identity, because S1 and S2 end in
    zeros. (The block of the `adapters` library, whose names these are, cannot run.)

    Args:
        width: Hidden size.
        non_linearity: Activation inside S1 and S2.
        reduction_factor: Half the hidden size over the inner size of S1 and S2.
    """

    clamp = 5.0

    def __init__(self, width: int, non_linearity: str, reduction_factor: float) -> None:
        super().__init__()
        self.left = width // 2
        self.right = width - self.left
        self.s1 = _subnet(self.left, 2 * self.right, non_linearity, reduction_factor)
        self.s2 = _subnet(self.right, 2 * self.left, non_linearity, reduction_factor)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``(batch, sequence, width)`` to the same."""
        x1, x2 = torch.split(hidden, [self.left, self.right], dim=-1)
        s2, t2 = torch.split(self.s2(x2), self.left, dim=-1)
        y1 = self._scale(s2) * x1 + t2
        s1, t1 = torch.split(self.s1(y1), self.right, dim=-1)
        return torch.cat([y1, self._scale(s1) * x2 + t1], dim=-1)

    def inverse(self, hidden: Tensor) -> Tensor:
        """Undoes `forward`."""
        y1, y2 = torch.split(hidden, [self.left, self.right], dim=-1)
        s1, t1 = torch.split(self.s1(y1), self.right, dim=-1)
        x2 = (y2 - t1) / self._scale(s1)
        s2, t2 = torch.split(self.s2(x2), self.left, dim=-1)
        return torch.cat([(y1 - t2) / self._scale(s2), x2], dim=-1)

    def _scale(self, log: Tensor) -> Tensor:
        return torch.exp(self.clamp * 0.636 * torch.atan(log / self.clamp))


_KINDS = {"nice": NiceCoupling, "glow": GlowCoupling}


def build_coupling(sites: Mapping[str, AttachedSite], config: BnConfig) -> dict[str, nn.Module]:
    """The coupling block of a configuration with ``inv_adapter``, at the embedding site.

    Raises:
        UnsupportedError: If the architecture names no embeddings.
        ConfigError: If the reduction factor is missing, or leaves nothing.
    """
    late = config.inv_adapter_late and "late_embeddings" in sites
    site = sites.get("late_embeddings" if late else "embeddings")
    if site is None:
        raise lacking("An invertible adapter", ["embeddings"])
    factor = config.inv_adapter_reduction_factor
    if factor is None or factor <= 0:
        raise ConfigError("inv_adapter needs a positive inv_adapter_reduction_factor.")
    kind = _KINDS[str(config.inv_adapter)]
    with seeded(config.init_weights_seed):
        return {site.address: kind(site.width, config.non_linearity, factor)}


def _subnet(inputs: int, outputs: int, non_linearity: str, factor: float) -> nn.Sequential:
    inner = int(inputs // factor)
    if inner < 1:
        raise ConfigError(
            f"inv_adapter_reduction_factor={factor:g} leaves nothing of the half of the hidden "
            f"size, {inputs}; it must not be larger than that."
        )
    net = nn.Sequential(
        nn.Linear(inputs, inner),
        activation(non_linearity) or nn.Identity(),
        nn.Linear(inner, outputs),
    )
    nn.init.normal_(net[0].weight, std=0.02)  # type: ignore[arg-type]
    for zero in (net[0].bias, net[2].weight, net[2].bias):
        nn.init.zeros_(zero)  # type: ignore[arg-type]
    return net
