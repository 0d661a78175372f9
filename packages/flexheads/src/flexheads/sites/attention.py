"""The attention site: where keys and values of an adapter join those of the attention."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexheads.errors import UnsupportedError
from flexheads.sites.attention_masks import additive, flat_mask, positions, prefix_keep, widen
from flexheads.sites.base import AttachedSite, first_argument
from flexheads.sites.direct import quiet
from flexheads.sites.hooking import hook_before
from flexheads.sites.joining import (
    CACHES,
    Joined,
    head_sizes,
    implementation,
    mechanism,
    private_config,
    replaced,
    undoing,
)
from flexheads.sites.relative_bias import relative_bias
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime
from flexheads.specs import Side

INTERFACE = "flexheads_prefix"
"""The name of our function among the attention implementations of transformers."""

_MASKS = ("attention_mask", "mask")
_STATES = ("key_value_states", "encoder_hidden_states")


class AttentionPart(nn.Module):
    """What an adapter has at an attention site.

    Attributes:
        length: Number of positions that it adds.
        reads_hidden: Whether it looks at the hidden states, and not only at how many rows there
            are, and at their dtype and device; else it may be given any tensor of that kind.
    """

    length: int
    reads_hidden: bool = True

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that come before the attention's own.

        Args:
            hidden: What the attention is given, ``(batch, sequence, hidden)``.

        Returns:
            Two tensors ``(batch, key heads, prefix length, head size)``.
        """
        raise NotImplementedError


class Prefix(NamedTuple):
    """Keys and values ``(batch, key heads, prefix length, head size)``, and which of them count.

    `keep` is ``(batch, 1, 1, prefix length)``, True where a position counts; None is everywhere.
    """

    keys: Tensor
    values: Tensor
    keep: Tensor | None


class AttentionOp(NamedTuple):
    """What an attention site does in one plan."""

    chains: tuple[tuple[AttentionPart, ...], ...]
    rows: RowMap | None
    lengths: tuple[int, ...]
    """The positions that each chain adds."""

    def prefix(self, hidden: Tensor) -> Prefix:
        """The prefix of each row; shorter ones start later, and what is before does not count."""
        if self.rows is None:
            return Prefix(*join_prefixes(self.chains[0], hidden), None)
        split, present = self.rows.split(hidden), self.rows.present(hidden.shape[0])
        lengths, longest = [self.lengths[number] for number in present], max(self.lengths)
        found = [
            join_prefixes(self.chains[number], own) if length else None
            for number, own, length in zip(present, split, lengths, strict=True)
        ]
        some = next((own for own in found if own is not None), None)
        if some is None:  # the chains with a prefix have no rows
            some = join_prefixes(self.chains[self.lengths.index(longest)], hidden[:0])
        heads, _, size = some[0].shape[1:]
        both: list[Tensor] = []
        for which in (0, 1):
            padded = [
                own.new_zeros(own.shape[0], heads, longest, size)
                if pair is None
                else functional.pad(pair[which], (0, 0, longest - length, 0))
                for pair, own, length in zip(found, split, lengths, strict=True)
            ]
            both.append(self.rows.merge(padded))
        if len(set(self.lengths)) == 1:
            return Prefix(both[0], both[1], None)
        keeps = [prefix_keep(own, longest, n) for own, n in zip(split, lengths, strict=True)]
        return Prefix(both[0], both[1], self.rows.merge(keeps))


def join_prefixes(chain: Sequence[AttentionPart], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The prefix of a chain: each adapter's stands before those of the adapters before it."""
    keys: Any = None
    values: Any = None
    for part in chain:
        if part.length:
            own_keys, own_values = part.forward(hidden) if quiet(part) else part(hidden)
            if own_keys.dtype != hidden.dtype or own_keys.device != hidden.device:
                own_keys, own_values = own_keys.to(hidden), own_values.to(hidden)
            joined = Joined(own_keys, own_values)
            keys, values = (own_keys, own_values) if keys is None else joined(keys, values)
    return keys, values


class AttachedAttention(AttachedSite):
    """An attention module in a live model; its parts are `AttentionPart`.

    How a prefix gets in depends on the module's code, and is settled here once:

    ``interface``
        The module asks transformers for the function that attends. A private copy of its
        configuration names ours, which calls the one that the model's own configuration names.
    ``cache``
        The module asks a cache for earlier keys and values; it gets one that puts the prefix before
        what the real cache gives. The real cache never holds a prefix.
    ``projections``
        The results of the key and the value projection grow by the prefix.

    Attributes:
        stack: Number of the `LayerSpec` that it belongs to.
        index: Number of its layer in that stack.
        side: The side of an encoder-decoder model, or None.
        location: What AdapterHub files call this kind of attention, or None.
        key_heads: Number of its key and value heads.
        head_size: Size of each.
        shares_bias: Whether layers hand on a bias of the attention scores, by position.
        bias: Stands in for a method that makes such a bias; None where the module has none.
    """

    kind = "attention"

    def __init__(
        self,
        address: str,
        role: str,
        layer: int,
        host: nn.Module,
        runtime: Runtime,
        *,
        config: PretrainedConfig,
        stack: int,
        index: int,
        side: Side | None,
        location: str | None = None,
        projections: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        own: Any = getattr(host, "config", None) or config
        width = getattr(own, "hidden_size", None) or config.hidden_size
        super().__init__(address, role, layer, host, width, runtime)
        self.stack, self.index, self.side, self.location = stack, index, side, location
        self.projections = projections
        self.mechanism, self.names = mechanism(host, projections is not None)
        self.shares_bias = "position_bias" in self.names
        self.head_size, self.key_heads = head_sizes(host, own, width)
        self.bias = relative_bias(host, address, runtime)
        if self.bias is not None:
            self.bias.prefix = self._entered_length
        self.original: Any = None

    def needed(self, part: AttentionPart) -> frozenset[str]:
        reads = part.reads_hidden and self.mechanism == "interface"
        return frozenset({"attention", "hidden"} if reads else {"attention"})

    def check_way_in(self) -> None:
        """Refuses a module that leaves no way in for a prefix.

        Raises:
            UnsupportedError: If it does not.
        """
        if self.mechanism is None:
            raise UnsupportedError(
                f"{type(self.host).__name__} at {self.address} leaves no way in for a prefix with "
                "the installed transformers; update it, or choose another method."
            )

    def register(self, hook: str) -> RemovableHandle:
        if hook == "hidden":
            return hook_before(self.host, self._note)
        handles: list[RemovableHandle] = []
        if self.mechanism == "interface":
            vars(self.host)[INTERFACE] = self
            self.original = self.host.config
            self.host.config = private_config(self.original, INTERFACE)
        elif self.mechanism == "cache":
            handles = [hook_before(self.host, self._enter_cache)]
        else:
            assert self.projections is not None
            handles = [hook_before(self.host, self._enter_projections)]
            key, value = self.projections
            # Around the hooks of other adapters, which see as many rows as there are positions.
            handles += [
                key.register_forward_pre_hook(self._before_projection, prepend=True),
                value.register_forward_pre_hook(self._before_projection, prepend=True),
                key.register_forward_hook(self._after_key),
                value.register_forward_hook(self._after_value),
            ]
            if self.bias is not None:
                self.bias.enter()
        return undoing(handles, self._leave)

    def _leave(self) -> None:
        if self.bias is not None and self.mechanism == "projections":
            self.bias.leave()
        if self.mechanism == "interface":
            self.host.config = self.original
            vars(self.host).pop(INTERFACE, None)

    def op(self, chains: Sequence[Sequence[AttentionPart]], rows: RowMap | None) -> AttentionOp:
        lengths = tuple(sum(part.length for part in chain) for chain in chains)
        if self.shares_bias and len(set(lengths)) > 1:
            raise UnsupportedError(
                f"Rows of one batch have prefixes of {sorted(set(lengths))} positions, but this "
                "model counts relative positions through the prefix, for all rows alike. Run them "
                "in separate batches."
            )
        return AttentionOp(tuple(map(tuple, chains)), rows, lengths)

    def _planned(self) -> AttentionOp | None:
        op: AttentionOp | None = self.planned()
        return op if op is not None and any(op.lengths) else None

    # --- by the attention interface ---------------------------------------------------------------

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._planned() is not None:
            self.runtime.put(self.address, first_argument(args, kwargs))

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Attends with the prefix; arguments and result are those of an attention function."""
        chosen = implementation(self.original)
        attention = _attention(module, chosen)
        op = self._planned()
        if op is None:
            return attention(module, query, key, value, mask, *args, **kwargs)
        noted = self.runtime.take(self.address)  # where a part reads it
        keys, values, keep = op.prefix(query if noted is None else noted)
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if "flash" in chosen or "flex" in chosen:
            mask = flat_mask(chosen, mask, keep, key, keys.shape[2], kwargs)
        else:
            if mask is None and causal and chosen != "eager" and query.shape[2] > 1:
                mask = positions(query.shape[2], key.shape[2], query.device)
            mask = widen(mask, keys.shape[2], keep, key.shape[2], query)
            if mask is not None and kwargs.get("is_causal") is not None:
                kwargs["is_causal"] = False
        key, value = Joined(keys, values)(key, value)
        return attention(module, query, key, value, mask, *args, **kwargs)

    # --- by a cache -------------------------------------------------------------------------------

    def _enter_cache(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        op, given = self._planned(), {**dict(zip(self.names, args, strict=False)), **kwargs}
        changes: dict[str, Any] = {}
        if self.shares_bias:
            changes = self._fit_bias(given, max(op.lengths) if op is not None else 0)
        if op is not None:
            hidden = first_argument(args, kwargs)
            keys, values, keep = op.prefix(hidden)
            name = next(word for word in CACHES if word in self.names)
            cache = given.get(name)
            changes[name] = Joined(keys, values).cache(cache)
            states = next((given[n] for n in _STATES if given.get(n) is not None), None)
            total = _key_length(module, hidden, states, cache)
            mask_name = next(word for word in _MASKS if word in self.names)
            mask = given.get(mask_name)
            causal = getattr(module, "is_causal", None)
            causal = getattr(module, "is_decoder", False) if causal is None else causal
            if mask is None and causal and states is None and hidden.shape[1] > 1:
                mask = positions(hidden.shape[1], total, hidden.device)
                mask = additive(mask, hidden)
            changes[mask_name] = widen(mask, keys.shape[2], keep, total, hidden)
        return replaced(self.names, args, kwargs, changes) if changes else None

    def _fit_bias(self, given: Mapping[str, Any], length: int) -> dict[str, Any]:
        """Fits the bias of another layer to this one's prefix, where layers differ in that."""
        place, bias = f"bias of {self.role} {self.stack}", given.get("position_bias")
        before = self.runtime.peek(place)
        self.runtime.put(place, length)
        if bias is None or before is None or before == length:
            return {}
        return {"position_bias": functional.pad(bias, (length - before, 0))}

    # --- by the projections -----------------------------------------------------------------------

    def _enter_projections(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        op = self._planned()
        if op is None:
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        hidden = first_argument(args, kwargs)
        keys, values, keep = op.prefix(hidden)
        length = keys.shape[2]
        changes: dict[str, Any] = {}
        for word in ("key", "value"):
            if word in given:  # its length is read, so it must be that of the projection's result
                changes[word] = functional.pad(given[word], (0, 0, length, 0))
        self.runtime.put(self.address, (keys, values, length if changes else 0))
        mask_name = next((word for word in _MASKS if word in self.names), None)
        if mask_name is None:
            if keep is not None or given.get("relative_position_bias") is not None:
                raise UnsupportedError(
                    f"{type(module).__name__} takes no mask with the installed transformers: no "
                    "prefixes of different lengths in one batch, no biases by position. Update it."
                )
            return replaced(self.names, args, kwargs, changes) if changes else None
        mask = given.get(mask_name)
        if mask is not None and self.bias is not None:  # true may be attended to, in any dtype
            mask = mask.bool()
        changes[mask_name] = widen(mask, length, keep, hidden.shape[1], hidden)
        return replaced(self.names, args, kwargs, changes)

    def _before_projection(self, module: nn.Module, args: Any) -> Any:
        padding = 0 if self._planned() is None else self.runtime.peek(self.address)[2]
        return (args[0][:, padding:], *args[1:]) if padding else None

    def _after_key(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return self._grow(output, 0)

    def _after_value(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return self._grow(output, 1)

    def _grow(self, output: Tensor, which: int) -> Tensor | None:
        if self._planned() is None or (self.bias is not None and self.bias.running):
            return None
        prefix = self.runtime.peek(self.address)[which]
        return Joined(prefix, prefix).before(prefix.transpose(1, 2).flatten(2), output, dim=1)

    def _entered_length(self) -> int:
        """The positions of the prefix that the keys of this call begin with."""
        entered = self.runtime.peek(self.address) if self._planned() is not None else None
        return 0 if entered is None else int(entered[0].shape[2])


def prefix_attention(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The attention function that stands in for the model's own where there are prefixes."""
    site = vars(module).get(INTERFACE)
    if site is None:  # the last prefix went in another thread, since the module has looked
        return _attention(module, implementation(module.config))(module, *args, **kwargs)
    return site.attend(module, *args, **kwargs)


def _attention(module: Any, chosen: str) -> Any:
    """The attention function of that name, as a module would find it."""
    if chosen == "eager":
        return vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return ALL_ATTENTION_FUNCTIONS[chosen]


AttentionInterface.register(INTERFACE, prefix_attention)


def _key_length(module: Any, hidden: Tensor, states: Tensor | None, cache: Any) -> int:
    """How many keys an attention will have of its own, before its cache has the new ones."""
    if states is not None:
        return states.shape[1]
    before = (
        0 if cache is None else int(cache.get_seq_length(getattr(module, "layer_idx", None) or 0))
    )
    return hidden.shape[1] + before
