"""Attention masks that grow by a prefix, in every form that transformers gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from flexheads.errors import UnsupportedError
from flexheads.sites.derived import notes


def lowest(dtype: torch.dtype) -> float:
    """What an additive mask holds where nothing may be attended to."""
    return torch.finfo(dtype).min


def positions(queries: int, keys: int, device: torch.device) -> Tensor:
    """The causal mask ``(1, 1, queries, keys)`` where the first query is at the first key.

    That is what attention functions without a mask do; keys beyond the queries are those of a
    static cache that is not full.
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """A boolean mask as one that is added to scores, in the dtype of another tensor."""
    return like.new_zeros(mask.shape).masked_fill(~mask, lowest(like.dtype))


def prefix_keep(rows: Tensor, longest: int, length: int) -> Tensor:
    """Which of `longest` positions are among the last `length`: ``(batch, 1, 1, longest)``."""
    keep = torch.arange(longest, device=rows.device) >= longest - length
    return keep.expand(rows.shape[0], 1, 1, longest)


def widen(
    mask: Tensor | None, length: int, keep: Tensor | None, keys: int, like: Tensor
) -> Tensor | None:
    """A mask for keys that a prefix stands before; one for all layers that are given one mask.

    Args:
        mask: The mask for the attention's own keys, its last dimension: boolean or whole numbers
            (true may be attended to), or additive; None is every key.
        length: Positions of the prefix.
        keep: Which of them count, ``(batch, 1, 1, length)``; None is all. For a mask
            ``(batch, keys)`` it is ``(batch, length)``.
        keys: Number of the attention's own keys.
        like: A tensor in whose dtype a mask can be added.
    """
    noted = None if is_compiling() or mask is None or keep is not None else notes()
    if mask is None or noted is None or mask.requires_grad:
        return _widen(mask, length, keep, keys, like)
    asked = length, keys, None if mask.is_inference() else mask._version
    known: tuple[Any, Any, Tensor | None] = noted.found.get(widen, (None, None, None))
    if known[0] is not mask or known[1] != asked:
        known = noted.found[widen] = mask, asked, _widen(mask, length, None, keys, like)
    return known[2]


def _widen(
    mask: Tensor | None, length: int, keep: Tensor | None, keys: int, like: Tensor
) -> Tensor | None:
    if mask is None and keep is None:
        return None
    if mask is None:
        assert keep is not None
        mask = like.new_zeros(keep.shape[0], 1, 1, keys)
    mask = mask[..., :keys]
    shape = (*mask.shape[:-1], length)
    additive = mask.is_floating_point() and mask.dim() > 2
    before = mask.new_zeros(shape) if additive else mask.new_ones(shape)
    if keep is not None:
        batch = keep.shape[0]
        before = before.expand(batch, *shape[1:])
        mask = mask.expand(batch, *mask.shape[1:])
        if additive:
            before = before.masked_fill(~keep, lowest(mask.dtype))
        else:
            before = before * keep.to(before.dtype) if before.dtype != torch.bool else before & keep
    return torch.cat([before, mask], dim=-1)


def flat_mask(
    chosen: str, mask: Any, keep: Tensor | None, key: Tensor, length: int, kwargs: dict[str, Any]
) -> Tensor | None:
    """The mask of attention functions that take none, or one by key: ``(batch, keys)``."""
    if "flex" in chosen:
        raise UnsupportedError(
            "Prefixes do not work with flex_attention; load the model with "
            'attn_implementation="sdpa", "eager" or a flash attention.'
        )
    if kwargs.get("sliding_window") is not None and key.shape[2] > kwargs["sliding_window"]:
        raise UnsupportedError(
            "Flash attention with a sliding window would lose the prefix; load the model with "
            'attn_implementation="sdpa".'
        )
    if mask is None and keep is None:
        return None
    mask = key.new_ones(key.shape[0], key.shape[2]).bool() if mask is None else mask
    return widen(mask, length, None if keep is None else keep[:, 0, 0], key.shape[2], key)
