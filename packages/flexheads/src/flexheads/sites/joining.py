"""How a prefix of keys and values joins those of an attention module, and how that is undone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import EncoderDecoderCache

from flexheads.sites.base import argument_names

CACHES = ("past_key_values", "past_key_value", "layer_past")


def mechanism(host: nn.Module, has_projections: bool) -> tuple[str | None, tuple[str, ...]]:
    """How a prefix can get into an attention module, and the names of its arguments.

    Args:
        host: The module.
        has_projections: Whether its key and value projections are known.
    """
    forward = inspect.unwrap(type(host).forward)
    names = argument_names(forward)
    if "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names and "position_bias" not in names:
        return "interface", names
    if any(word in names for word in CACHES):
        return "cache", names
    # Such a bias is for the module's own keys, one by one.
    biased = getattr(host, "has_relative_position_bias", False) or "position_bias" in names
    return ("projections" if has_projections and not biased else None), names


_IMPLEMENTATION = "_attn_implementation_internal"


def implementation(config: Any) -> Any:
    """The attention that a configuration names."""
    # Each look at an attribute of a configuration runs code of its class, each layer looks.
    found = vars(config).get(_IMPLEMENTATION)
    return config._attn_implementation if found is None else found


def private_config(config: Any, name: str) -> Any:
    """A copy of a configuration that names another attention, and shares everything else."""
    private = copy.copy(config)
    # The public setter would write into the configurations that both share.
    vars(private)[_IMPLEMENTATION] = name
    return private


def replaced(
    names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], changes: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with some of them replaced, each where it was."""
    by_place = dict(zip(names, args, strict=False))
    inside = [name for name in changes if name in by_place]
    placed = tuple(changes[n] if n in inside else value for n, value in by_place.items())
    rest = {name: value for name, value in changes.items() if name not in inside}
    return (*placed, *args[len(placed) :]), {**kwargs, **rest}


def head_sizes(host: Any, config: Any, width: int) -> tuple[int, int]:
    """The size of a head, and how many key and value heads a module has."""
    heads = _first_of(host, ("num_heads", "num_attention_heads", "n_heads"))
    heads = heads or getattr(config, "num_attention_heads", None) or 1
    words = ("head_dim", "attention_head_size", "key_value_proj_dim")
    size = _first_of(host, words) or _first_of(config, ("head_dim", "d_kv"))
    keys = getattr(config, "num_key_value_heads", None) or heads
    return int(size or width // heads), int(keys)


def _first_of(owner: Any, names: Sequence[str]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


class Joined:
    """A prefix that stands before keys and values.

    Args:
        keys, values: The prefix, ``(batch, key heads, prefix length, head size)``.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix and what comes after it: ``(batch, key heads, length, head size)``."""
        return self.before(self.keys, keys), self.before(self.values, values)

    @staticmethod
    def before(prefix: Tensor, own: Tensor, dim: int = 2) -> Tensor:
        """The prefix and the attention's own, in the dtype of the latter."""
        if prefix.dtype != own.dtype:  # a conversion to what it is takes time too
            prefix = prefix.to(own.dtype)
        return torch.cat([prefix, own], dim=dim)

    def cache(self, inner: Any) -> Any:
        """A cache that gives the prefix before what another gives, and stores nothing of it."""
        if not isinstance(inner, EncoderDecoderCache):
            return _PrefixedCache(self, inner)
        both: Any = EncoderDecoderCache.__new__(EncoderDecoderCache)
        both.__dict__.update(inner.__dict__)
        both.self_attention_cache = _PrefixedCache(self, inner.self_attention_cache)
        both.cross_attention_cache = _PrefixedCache(self, inner.cross_attention_cache)
        return both


class _PrefixedCache:
    """Stands in for a cache inside one attention module."""

    def __init__(self, joined: Joined, inner: Any) -> None:
        self.joined, self.inner = joined, inner

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stores keys and values in the real cache; gives all of them behind the prefix."""
        if self.inner is not None:
            keys, values = self.inner.update(keys, values, *args, **kwargs)
        return self.joined(keys, values)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """The number of positions that the real cache holds."""
        return 0 if self.inner is None else self.inner.get_seq_length(*args, **kwargs)

    @property
    def layers(self) -> _Layers:
        """The stored keys and values of each layer, behind the prefix."""
        return _Layers(self.joined, self.inner.layers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


class _Layers:
    def __init__(self, joined: Joined, layers: Any) -> None:
        self.joined, self.layers = joined, layers

    def __getitem__(self, index: int) -> _Layer:
        layer = self.layers[index]
        return _Layer(*self.joined(layer.keys, layer.values))


class _Layer:
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class Undoing(RemovableHandle):
    """Several registrations that are undone together, with something to do afterwards."""

    def __init__(self, handles: Sequence[RemovableHandle], after: Callable[[], None]) -> None:
        self.handles, self.after = list(handles), after

    def remove(self) -> None:
        """Undoes them."""
        for handle in self.handles:
            handle.remove()
        self.after()

    def __getstate__(self) -> Any:
        return {"handles": self.handles, "after": self.after}

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state)


def undoing(handles: Sequence[RemovableHandle], after: Callable[[], None]) -> RemovableHandle:
    """One handle for several registrations; see `Undoing`."""
    return Undoing(handles, after)
