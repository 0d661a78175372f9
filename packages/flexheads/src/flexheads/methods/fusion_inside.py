"""AdapterFusion computed inside of its adapters, so that no adapter's result is ever made.

An adapter n of rank r gives ``u_n = U_n h_n + b_n`` with ``h_n = act(D_n x + d_n)``. The fusion
(arXiv:2005.00247, equations 1 to 4) asks with ``q = Q y + w``, and with k for the bias of the keys

    ``score_n = q . (K u_n + k) = h_n . (U_n' K' q) + b_n . (K' q) + q . k``
    ``result = V (sum_n a_n u_n) = V [U_1 ... b_1 ...] [a_1 h_1, ..., a_1, ...]``

So what is as wide as the model are the query and the result, and all adapters together are two
products. ``U' K' Q`` and ``V U`` are chains of products: they begin with what has fewer rows, the
tokens or the values inside of the adapters. For many tokens it is then nearly as quick as with
what `flexheads.methods.folding` keeps, and gradients pass through all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexheads.methods.bottleneck import Bottleneck
from flexheads.sites.direct import are_plain, quiet

if TYPE_CHECKING:
    from flexheads.methods.fusion import FusionPart


def looks_inside(fusion: FusionPart, parts: Sequence[Any]) -> bool:
    """Whether a fusion of some parts can be computed so, and is cheaper than as it is.

    The parts must be plain bottlenecks with one activation, and all weights of one dtype. Each
    value inside of an adapter is used once more than otherwise, so that many large adapters are
    cheaper as they are.

    Args:
        fusion: The attention.
        parts: What it attends to.
    """
    projections = fusion.projections()
    if not (all(map(_is_bottleneck, parts)) and are_plain(*projections)):
        return False
    linear = [*projections, *(p for part in parts for p in (part.down, part.up))]
    kinds = {(part.config.non_linearity, type(part.activation)) for part in parts}
    weights = [each.weight for each in linear]
    if len({weight.dtype for weight in weights}) > 1 or len(kinds) > 1:
        return False
    if any(True for _ in parts[0].activation.parameters()):
        return False  # each has learned its own
    if any(type(weight) not in (nn.Parameter, Tensor) for weight in weights):
        return False  # quantised or sharded ones can do no more than their layer needs
    width: int = parts[0].down.in_features
    return len(parts) * max(map(rank_of, parts)) <= max(1, len(projections)) * width


def _is_bottleneck(part: Any) -> bool:
    """Whether a part is a bottleneck as in the formula."""
    if type(part) is not Bottleneck or part.norm_before is not None:
        return False
    linear = (part.down, part.up)
    return are_plain(*linear) and all(one.bias is not None for one in linear)


def rank_of(part: Any) -> int:
    """How many values a bottleneck has inside."""
    rank: int = part.down.out_features
    return rank


def runs_unseen(fusion: FusionPart, parts: Sequence[Any]) -> bool:
    """Whether nobody would notice that the layers do not run, and nothing is dropped by row."""
    layers = (layer for part in parts for layer in (part.down, part.activation, part.up))
    if not quiet(fusion, *fusion.projections(), *layers):
        return False
    return not any(part.training and part.config.stochastic_depth for part in parts)


def attend_inside(
    fusion: FusionPart,
    parts: Sequence[Any],
    hidden: Tensor,
    query: Tensor,
    residual: Tensor | None,
) -> Tensor:
    """What a fusion gives, ``(batch, sequence, width)``.

    Args:
        fusion: The attention.
        parts: The bottlenecks.
        hidden: What they see, of that shape.
        query: What asks, of that shape.
        residual: What is added to each adapter's output first, or None.
    """
    entry, offset, leave = _joined(parts)
    count, size = len(parts), len(entry)
    tokens_first = residual is not None or _are_fewer(hidden.shape[:-1].numel(), size)
    inner = parts[0].activation.forward(functional.linear(hidden, entry, offset))
    asked, common = _asked(fusion, leave, query, tokens_first)
    keys, scores = torch.split(asked, [size, count], dim=-1)
    each = (count, size // count)
    scores = scores + (inner * keys).unflatten(-1, each).sum(dim=-1)
    attention = fusion.attention(scores if common is None else scores + common)
    weighed = (inner.unflatten(-1, each) * attention.unsqueeze(-1)).flatten(-2)
    return _given(fusion, leave, torch.cat([weighed, attention], -1), residual, tokens_first)


def _are_fewer(tokens: int, size: int) -> bool:
    """Whether there are fewer tokens than values inside; an exported graph is to serve any."""
    exporting = getattr(torch.compiler, "is_exporting", None)
    return (exporting is not None and exporting()) or tokens < size


def _joined(parts: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """All adapters as one.

    Returns:
        With n adapters of rank r, what leads inside, ``(n * r, width)`` and ``(n * r,)``, and what
        leads out of what is inside and, for the biases, of a one for each adapter,
        ``(width, n * r + n)``.
    """
    rank = max(map(rank_of, parts))
    entries, offsets, ups, biases = zip(*(_alike(part, rank) for part in parts), strict=True)
    return torch.cat(entries), torch.cat(offsets), torch.cat([*ups, *biases], dim=1)


def _alike(part: Any, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``D``, ``d``, ``U`` and ``b`` as a column, scaled, with zeros behind what the part has."""
    entry, offset, up = part.down.weight, part.down.bias, part.up.weight
    bias = part.up.bias.unsqueeze(-1)
    if part.config.scaling != 1:
        learned = isinstance(part.scaling, nn.Parameter)
        scaling = part.scaling.unsqueeze(-1) if learned else part.scaling
        up, bias = up * scaling, bias * scaling
    more = rank - rank_of(part)
    if more:
        entry, offset = functional.pad(entry, (0, 0, 0, more)), functional.pad(offset, (0, more))
        up = functional.pad(up, (0, more))
    return entry, offset, up, bias


def _asked(
    fusion: FusionPart, leave: Tensor, query: Tensor, tokens_first: bool
) -> tuple[Tensor, Tensor | None]:
    """What all values inside are multiplied by for the scores, and what is added to each score.

    The latter is ``q . k``, where it makes a difference.
    """
    asks, key = fusion.query, fusion.key
    bias = key.bias if key is not None and fusion.sees_key_bias() else None
    if tokens_first:
        asked = query if asks is None else functional.linear(query, asks.weight, asks.bias)
        keyed = asked if key is None else torch.matmul(asked, key.weight)
        common = None if bias is None else torch.matmul(asked, bias).unsqueeze(-1)
        return torch.matmul(keyed, leave), common
    rows = leave.t() if key is None else torch.matmul(key.weight, leave).t()
    rows = rows if bias is None else torch.cat([rows, bias.unsqueeze(0)])
    if asks is None:
        found = functional.linear(query, rows)
    else:
        found = functional.linear(query, rows @ asks.weight, rows @ asks.bias)
    return (found, None) if bias is None else (found[..., :-1], found[..., -1:])


def _given(
    fusion: FusionPart,
    leave: Tensor,
    weighed: Tensor,
    residual: Tensor | None,
    tokens_first: bool,
) -> Tensor:
    """What leads out of the weighed values inside, as the values' projection sees it."""
    value = fusion.value
    if value is None or tokens_first:
        context = functional.linear(weighed, leave)
        context = context if residual is None else context + residual
        return context if value is None else functional.linear(context, value.weight)
    return functional.linear(weighed, value.weight @ leave)
