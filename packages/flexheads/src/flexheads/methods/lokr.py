"""LoKr: the Kronecker product of two small matrices, added to a projection."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flexheads.methods.projections import DeltaConfig, DeltaPart, ProjectionMethod, draw_
from flexheads.sites.linear import AttachedLinear


@dataclasses.dataclass(frozen=True, eq=False)
class LoKrConfig(DeltaConfig):
    """Low-rank Kronecker product (LyCORIS, Yeh et al. 2023, arXiv:2309.14859).

    Attributes:
        init_weights: True starts with a left factor of zeros, ``"lycoris"`` with a right factor of
            zeros, False with random ones. The first two change nothing at the start.
        decompose_both: Whether the left factor too becomes a low-rank product, where that is
            smaller.
        decompose_factor: The size of the left factor, where it divides that of the projection;
            else a bound on it. -1 is as near to the square root as possible.
        rank_dropout_scale: Whether rows that rank dropout keeps are scaled up.
    """

    architecture: ClassVar[str | None] = "lokr"

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False

    def problems(self) -> list[str]:
        wrong = super().problems()
        factor = self.decompose_factor
        if factor != int(factor) or (factor != -1 and factor < 1):
            wrong.append(f"decompose_factor={factor!r} must be a positive whole number, or -1")
        return wrong

    @property
    def initialisations(self) -> tuple[Any, ...]:
        return (True, False, "lycoris")


def factorise(size: int, factor: int = -1) -> tuple[int, int]:
    """Two whole numbers whose product is `size`.

    Args:
        size: The number.
        factor: The first of them, where it divides `size`; else a bound on it. -1 is no bound.

    Returns:
        Otherwise the pair that is nearest to the square root, the smaller first.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(divisor for divisor in range(bound, 0, -1) if size % divisor == 0)
    return small, size // small


class Factor(nn.Module):
    """One factor: a matrix ``(rows, columns)``, or the product of two of rank `r`."""

    def __init__(self, rows: int, columns: int, r: int, low_rank: bool) -> None:
        super().__init__()
        if low_rank:
            self.a = nn.Parameter(torch.empty(rows, r))
            self.b = nn.Parameter(torch.empty(r, columns))
        else:
            self.full = nn.Parameter(torch.empty(rows, columns))
        self.low_rank = low_rank
        for parameter in self.parameters():
            draw_(parameter)

    def forward(self) -> Tensor:
        """The matrix."""
        return self.a @ self.b if self.low_rank else self.full


class Kronecker(DeltaPart):
    """``D = (w1 ⊗ w2) * scaling`` (section 3.2 of the paper).

    `w1` is ``(l, m)`` and `w2` is ``(k, n)``, with ``l * k`` the width of the projection's result
    and ``m * n`` that of its input.
    """

    def __init__(self, in_features: int, out_features: int, config: LoKrConfig) -> None:
        super().__init__(config, rescaled=config.rank_dropout_scale)
        out_left, out_right = factorise(out_features, config.decompose_factor)
        in_left, in_right = factorise(in_features, config.decompose_factor)
        r = config.r
        left_low = config.decompose_both and r < max(out_left, in_left) / 2
        self.w1 = Factor(out_left, in_left, r, left_low)
        self.w2 = Factor(out_right, in_right, r, r < max(out_right, in_right) / 2)
        if config.init_weights == "lycoris":
            nn.init.zeros_(self.w2.b if self.w2.low_rank else self.w2.full)
        elif config.init_weights:
            nn.init.zeros_(self.w1.a if self.w1.low_rank else self.w1.full)

    def delta(self) -> Tensor:
        return torch.kron(self.w1(), self.w2()) * self.scaling

    def product(self, hidden: Tensor) -> Tensor:
        # (w1 ⊗ w2) vec(X) = vec(w1 X w2'), rows first; far smaller than the whole weight.
        left: Tensor = self.w1() * self.scaling
        right: Tensor = self.w2()
        square = hidden.reshape(*hidden.shape[:-1], left.shape[1], right.shape[1])
        return (left @ (square @ right.t())).flatten(-2)


class LoKrMethod(ProjectionMethod):
    """Puts a `Kronecker` at the projections that the configuration names."""

    config: LoKrConfig

    def part(self, site: AttachedLinear) -> Kronecker:
        return Kronecker(site.in_features, site.out_features, self.config)
