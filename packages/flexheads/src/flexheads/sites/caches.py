"""Caches of keys and values: how much they hold, and rows of them that can be repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)


def past_length(cache: Any) -> int | Tensor:
    """How many positions a cache of keys and values holds."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        length: int | Tensor = cache.get_seq_length()
        return length.clone() if isinstance(length, Tensor) else length  # some count in place
    return int(cache[0][0].shape[-2]) if cache and cache[0] is not None else 0


def fills_by_layer(cache: Any) -> bool:
    """Whether a cache is empty and takes from each layer as many rows as it gives.

    Others have memory for a number of rows from the beginning, keep what can only be read through
    them (quantised, or on another device), or are of a class that may do anything.
    """
    if type(cache) is EncoderDecoderCache:
        return all(map(fills_by_layer, _sides(cache)))
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return False
    layers: list[Any] = cache.layers
    return all(type(own) in _GROWING and own.get_seq_length() == 0 for own in layers)


def change_rows(cache: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the keys and values of every layer of a cache, in place.

    Args:
        cache: The cache.
        change: Makes of ``(rows, ...)`` the new tensor.
    """
    for side in _sides(cache):
        change_rows(side, change)
    for layer in getattr(cache, "layers", ()):
        for name in ("keys", "values"):
            if isinstance(tensor := getattr(layer, name, None), Tensor):
                setattr(layer, name, change(tensor))


def _sides(cache: Any) -> Iterator[Any]:
    """The caches of the decoder and of what it reads of the encoder, where there are two."""
    for name in ("self_attention_cache", "cross_attention_cache"):
        if (side := getattr(cache, name, None)) is not None:
            yield side
