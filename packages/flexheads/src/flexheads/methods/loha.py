"""LoHa: the Hadamard product of two low-rank products, added to a projection."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexheads.methods.projections import DeltaConfig, DeltaPart, ProjectionMethod, draw_
from flexheads.sites.linear import AttachedLinear


@dataclasses.dataclass(frozen=True, eq=False)
class LoHaConfig(DeltaConfig):
    """Low-rank Hadamard product (FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098).

    The rank of the added weight is up to ``r * r``, with the parameters of two products of rank
    ``r``. Fields as in `DeltaConfig` and `ProjectionConfig`.
    """

    architecture: ClassVar[str | None] = "loha"


class Hadamard(DeltaPart):
    """``D = (X1 Y1) * (X2 Y2) * scaling``, elementwise in the middle (Proposition 1 of the paper).

    `hada_w1_a` and `hada_w2_a` are ``(out, r)``, `hada_w1_b` and `hada_w2_b` are ``(r, in)``.
    """

    def __init__(self, in_features: int, out_features: int, config: LoHaConfig) -> None:
        super().__init__(config, rescaled=True)
        self.hada_w1_a = nn.Parameter(torch.empty(out_features, config.r))
        self.hada_w1_b = nn.Parameter(torch.empty(config.r, in_features))
        self.hada_w2_a = nn.Parameter(torch.empty(out_features, config.r))
        self.hada_w2_b = nn.Parameter(torch.empty(config.r, in_features))
        for parameter in self.parameters():
            draw_(parameter)
        if config.init_weights:
            nn.init.zeros_(self.hada_w2_b)

    def product(self, hidden: Tensor) -> Tensor:
        # Entry (o, i) of D is a sum over j and k of X1[o, j] X2[o, k] times Y1[j, i] Y2[k, i]: a
        # product of rank r * r, and where that is small, far less work than the whole weight.
        left, right = self.hada_w1_a, self.hada_w1_b
        if left.shape[1] ** 2 * (len(left) + right.shape[1]) > len(left) * right.shape[1]:
            return super().product(hidden)
        down = (right.unsqueeze(1) * self.hada_w2_b).flatten(0, 1)
        up = (left.unsqueeze(2) * self.hada_w2_a.unsqueeze(1)).flatten(1)
        return functional.linear(functional.linear(hidden, down), up) * self.scaling

    def delta(self) -> Tensor:
        first, second = self.hada_w1_a @ self.hada_w1_b, self.hada_w2_a @ self.hada_w2_b
        return first * second * self.scaling


class LoHaMethod(ProjectionMethod):
    """Puts a `Hadamard` at the projections that the configuration names."""

    config: LoHaConfig

    def part(self, site: AttachedLinear) -> Hadamard:
        return Hadamard(site.in_features, site.out_features, self.config)
