"""Invertible adapters: coupling blocks behind the embeddings, undone before a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flexheads.activations import activation
from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.base import seeded
from flexheads.sites.base import AttachedSite
from flexheads.sites.embedding import EmbeddingPart

if TYPE_CHECKING:
    from flexheads.methods.bottleneck import BnConfig


class NiceCoupling(EmbeddingPart):
    """An additive coupling block (NICE, Dinh et al. 2015, arXiv:1410.8516, equation 7).

    ``y1 = x1 + F(x2)`` and ``y2 = x2 + G(y1)``, over two halves of the hidden size.

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


def build_coupling(sites: Mapping[str, AttachedSite], config: BnConfig) -> dict[str, nn.Module]:
    """The coupling block of a configuration with ``inv_adapter``, at the embedding site.

    Raises:
        UnsupportedError: If the architecture names no embeddings, or the kind is not available.
        ConfigError: If the reduction factor is missing.
    """
    site = next((site for site in sites.values() if site.kind == "embedding"), None)
    if site is None:
        raise UnsupportedError(
            "This architecture names no embeddings, so it cannot carry an invertible adapter."
        )
    if config.inv_adapter != "nice":
        raise UnsupportedError(
            f'inv_adapter={config.inv_adapter!r} is not available in this version; "nice" is.'
        )
    factor = config.inv_adapter_reduction_factor
    if factor is None or factor <= 0:
        raise ConfigError("inv_adapter needs a positive inv_adapter_reduction_factor.")
    with seeded(config.init_weights_seed):
        return {site.address: NiceCoupling(site.width, config.non_linearity, factor)}


def _subnet(inputs: int, outputs: int, non_linearity: str, factor: float) -> nn.Sequential:
    inner = int(inputs // factor)
    net = nn.Sequential(
        nn.Linear(inputs, inner),
        activation(non_linearity) or nn.Identity(),
        nn.Linear(inner, outputs),
    )
    for linear in (net[0], net[2]):
        nn.init.normal_(linear.weight, std=0.02)  # type: ignore[arg-type]
        nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
    return net
