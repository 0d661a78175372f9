"""AdapterFusion folded into the rank of its adapters, for inference.

An adapter n of rank r gives ``u_n = U_n h_n + b_n`` with ``h_n = act(D_n x + d_n)``. With the
query ``q = W y + w`` its score is ``q . K u_n``, up to what is the same for all n, which the
softmax takes away; and the projection V of the values may act on each ``u_n``. So

    ``score_n = h_n . (U_n' K' W y + U_n' K' w) + (b_n' K' W y + b_n' K' w)``
    ``result = sum_n a_n ((V U_n) h_n + V b_n)``

where all products of weights are known before x and y are. No vector of the model's width is made
for each adapter, and all adapters together need two matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from flexheads.methods.fusion_inside import looks_inside, rank_of

if TYPE_CHECKING:
    from flexheads.methods.fusion import FusionPart

_COLUMNS = 8
"""A matrix product is faster where the number of its columns is a multiple of it."""


class FoldedFusion:
    """The attention of a `FusionPart` over bottlenecks; see `folded`.

    Each adapter has one value more than its rank, which is the same for all inputs; it carries the
    bias of the up-projection.

    Args:
        fusion: The attention.
        parts: The bottlenecks.
        constant: What their activation makes of a one.
    """

    def __init__(self, fusion: FusionPart, parts: Sequence[Any], constant: float) -> None:
        self.fusion, self.activation = fusion, parts[0].activation.forward
        self.value = None if fusion.value is None else fusion.value.weight
        self.count, self.rank = len(parts), 1 + max(map(rank_of, parts))
        self.inner = self.count * self.rank
        own: Tensor = parts[0].down.weight
        precise = own.dtype if own.dtype == torch.float64 else torch.float32
        ups = torch.cat([_up(part, self.rank, constant, precise) for part in parts])
        both = [_down(part, self.rank, precise) for part in parts]
        asked, offset = _asked(fusion, ups)
        more = -2 * self.inner % _COLUMNS
        self.sizes = [self.inner, self.inner, more]
        weight = torch.cat([*(w for w, _ in both), asked])
        bias = torch.cat([*(b for _, b in both), offset])
        self.weight = functional.pad(weight, (0, 0, 0, more)).to(own.dtype)
        self.bias = functional.pad(bias, (0, more)).to(own.dtype)
        ups = ups if self.value is None else functional.linear(ups, self.value.to(precise))
        self.up = ups.t().to(own.dtype).contiguous()

    def __call__(self, hidden: Tensor, query: Tensor, residual: Tensor | None) -> Tensor:
        """What the fusion gives, ``(batch, sequence, width)``.

        Args:
            hidden: What the adapters see, of that shape.
            query: What asks, of that shape.
            residual: What is added to each adapter's output first, or None.
        """
        shape = (*hidden.shape[:-1], self.count, self.rank)
        inner, asked = self._enter(hidden, query)
        inner = self.activation(inner)
        scores = (inner * asked).view(shape).sum(dim=-1)
        attention = self.fusion.attention(scores)
        weighed = (inner.view(shape) * attention.unsqueeze(-1)).view(inner.shape)
        context = functional.linear(weighed, self.up)
        if residual is None:
            return context
        # The weights of the adapters sum to one.
        value = self.value
        return context + (residual if value is None else functional.linear(residual, value))

    def _enter(self, hidden: Tensor, query: Tensor) -> Sequence[Tensor]:
        """What the down-projections give, and what it is multiplied by for the scores."""
        inner, weight, bias = self.inner, self.weight, self.bias
        if query is hidden:
            return torch.split(functional.linear(hidden, weight, bias), self.sizes, dim=-1)[:2]
        down = functional.linear(hidden, weight[:inner], bias[:inner])
        return down, functional.linear(query, weight[inner : 2 * inner], bias[inner : 2 * inner])


def folded(fusion: FusionPart, parts: Sequence[Any]) -> FoldedFusion | None:
    """The folded attention over some parts; None where they cannot be folded, or need not be.

    Args:
        fusion: The attention.
        parts: What it attends to.
    """
    if not looks_inside(fusion, parts):
        return None
    constant = float(parts[0].activation(torch.ones(1, dtype=torch.float64)))
    return FoldedFusion(fusion, parts, constant) if abs(constant) > 0.1 else None


def _down(part: Any, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``D``, ``(rank, width)``, and ``d``, ``(rank,)``: zeros behind what the part has, then a one.

    The one is in ``d``, so that the last value is the same for all inputs.
    """
    more = rank - rank_of(part)
    bias = functional.pad(part.down.bias, (0, more)).to(dtype)
    bias[-1] = 1.0
    return functional.pad(part.down.weight, (0, 0, 0, more)).to(dtype), bias


def _up(part: Any, rank: int, constant: float, dtype: torch.dtype) -> Tensor:
    """``U'``, ``(rank, width)``, its last row the bias, for a last value of `constant`."""
    scaling: Any = part.scaling if part.config.scaling != 1 else 1.0
    weight = part.up.weight.t().to(dtype)
    bias = part.up.bias.to(dtype) / constant
    zeros = weight.new_zeros(rank - 1 - rank_of(part), weight.shape[1])
    scaled: Tensor = torch.cat([weight, zeros, bias[None]]) * scaling
    return scaled.to(dtype)


def _asked(fusion: FusionPart, ups: Tensor) -> tuple[Tensor, Tensor]:
    """What y is multiplied by to meet what the up-projections are, and what is added to that.

    Args:
        fusion: The attention.
        ups: ``U'`` of all adapters, ``(adapters * rank, width)``.
    """
    keys = ups if fusion.key is None else functional.linear(ups, fusion.key.weight.to(ups.dtype))
    if fusion.query is None:
        return keys, keys.new_zeros(len(keys))
    weight, bias = fusion.query.weight.to(ups.dtype), fusion.query.bias.to(ups.dtype)
    return keys @ weight, keys @ bias
