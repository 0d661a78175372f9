"""Prefix tuning: learned keys and values that every attention sees before its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from flexheads.activations import activation
from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.base import AdapterMethod, check_leave_out, lacking, seeded
from flexheads.methods.config import AdapterConfig
from flexheads.methods.gating import gate_scores, new_gate
from flexheads.sites.attention import AttachedAttention, AttentionPart
from flexheads.sites.base import AttachedSite
from flexheads.sites.derived import Derived


@dataclasses.dataclass(frozen=True, eq=False)
class PrefixTuningConfig(AdapterConfig):
    """Prefix tuning (Li and Liang 2021, arXiv:2101.00190).

    Attributes:
        encoder_prefix: Put prefixes into the encoder of an encoder-decoder model.
        cross_prefix: Put them into the cross-attention of its decoder.
        leave_out: Numbers of the layers that get none.
        flat: Train keys and values themselves, instead of an embedding and a network that makes
            them.
        prefix_length: Number of positions, or a map from layer number to it, with ``"default"``
            for layers that it does not name.
        bottleneck_size: Width of the hidden layer of that network.
        non_linearity: Activation in it.
        dropout: Dropout on keys and values.
        use_gating: Multiply them by a learned gate, averaged over the sequence (UniPELT, Mao et
            al. 2022, arXiv:2110.07577).
        shared_gating: One gate for keys and values, instead of one for each.
        init_weights_seed: Seed for each kind of attention.
    """

    architecture: ClassVar[str | None] = "prefix_tuning"

    encoder_prefix: bool = True
    cross_prefix: bool = True
    leave_out: Sequence[int] = ()
    flat: bool = False
    prefix_length: int | Mapping[str, int] = 30
    bottleneck_size: int = 512
    non_linearity: str = "tanh"
    dropout: float = 0.0
    use_gating: bool = False
    shared_gating: bool = True
    init_weights_seed: int | None = None

    def __post_init__(self) -> None:
        lengths = self.prefix_length
        every = list(lengths.values()) if isinstance(lengths, Mapping) else [lengths]
        wrong = [
            f"{name}={value!r}"
            for name, value, right in (
                ("prefix_length", lengths, every and all(_is_count(n) for n in every)),
                ("bottleneck_size", self.bottleneck_size, _is_count(self.bottleneck_size)),
                ("dropout", self.dropout, 0.0 <= self.dropout < 1.0),
            )
            if not right
        ]
        if wrong:
            raise ConfigError(f"{type(self).__name__}: {', '.join(wrong)} is not a legal value.")

    def length(self, layer: int) -> int:
        """The number of positions in one layer.

        Raises:
            ConfigError: If the map has none for it.
        """
        lengths: Any = self.prefix_length
        if not isinstance(lengths, Mapping):
            return int(lengths)
        for key in (str(layer), layer, "default"):
            if key in lengths:
                return int(lengths[key])
        raise ConfigError(
            f"prefix_length={dict(lengths)!r} has no number for layer {layer}; add it or a default."
        )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


class _Pool(nn.Module):
    """Keys and values of one kind of attention in all layers; subclasses say how they are made."""

    def __init__(
        self, shape: tuple[int, int, int], length: int, config: PrefixTuningConfig
    ) -> None:
        super().__init__()
        self.layers, self.heads, self.size = shape
        self.length = length
        self.dropout = nn.Dropout(config.dropout)
        self.kept: Derived[list[tuple[Tensor, Tensor]]] = Derived()

    def states(self, layer: int) -> Tensor:
        """The keys and values of one layer: ``(2, heads, length, head size)``."""
        raise NotImplementedError

    def ready(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, ``(1, heads, length, head size)``, to be kept."""
        states = (self.states(layer).contiguous() for layer in range(self.layers))
        return [(keys[None], values[None]) for keys, values in states]


class FlatPool(_Pool):
    """Keys and values as they are.

    `control_trans` is ``(length * layers * 2 * heads * head size)``.

    Args:
        shape: ``(layers, key heads, head size)``.
        length: The longest prefix.
        config: The adapter's configuration.
    """

    def __init__(
        self, shape: tuple[int, int, int], length: int, config: PrefixTuningConfig
    ) -> None:
        super().__init__(shape, length, config)
        self.control_trans = nn.Parameter(torch.randn(length * self.layers * 2 * _width(shape)))

    def states(self, layer: int) -> Tensor:
        shape = (self.length, self.layers, 2, self.heads, self.size)
        return self.control_trans.view(shape)[:, layer].permute(1, 2, 0, 3)


class Pool(_Pool):
    """Keys and values made by a network.

    ``W2 act(W1 e + b1) + b2`` for each row e of `wte` (Li and Liang 2021, section 4.3). A layer
    needs its own rows of W2 only, so all layers together cost what one application costs.

    Args:
        width: Width of the embeddings.
        shape, length, config: See `FlatPool`.
    """

    def __init__(
        self, width: int, shape: tuple[int, int, int], length: int, config: PrefixTuningConfig
    ) -> None:
        super().__init__(shape, length, config)
        self.wte = nn.Embedding(length, width)
        self.control_trans = nn.Sequential(
            nn.Linear(width, config.bottleneck_size),
            activation(config.non_linearity) or nn.Identity(),
            nn.Linear(config.bottleneck_size, self.layers * 2 * _width(shape)),
        )

    def states(self, layer: int) -> Tensor:
        last: Any = self.control_trans[2]
        rows = 2 * self.heads * self.size
        own = slice(layer * rows, (layer + 1) * rows)
        inner = self.control_trans[:2](self.wte.weight)
        states = functional.linear(inner, last.weight[own], last.bias[own])
        return states.view(self.length, 2, self.heads, self.size).permute(1, 2, 0, 3)

    @torch.no_grad()
    def flattened(self) -> Tensor:
        """What `FlatPool.control_trans` has to be for the same keys and values."""
        states: Tensor = self.control_trans(self.wte.weight)
        return states.reshape(-1)


def _width(shape: tuple[int, int, int]) -> int:
    return shape[1] * shape[2]


class PrefixPart(AttentionPart):
    """The prefix of one attention module: a layer of a pool, and a gate of its own.

    Args:
        pool: The pool.
        layer: The number of this layer in it.
        length: Positions that this layer takes of it.
        width: Width of the hidden states.
        config: The adapter's configuration.
    """

    def __init__(
        self, pool: FlatPool | Pool, layer: int, length: int, width: int, config: PrefixTuningConfig
    ) -> None:
        super().__init__()
        self.pool, self.layer, self.length = (pool,), layer, length
        gates = 1 if config.shared_gating else 2
        self.gate = new_gate(width, gates) if config.use_gating else None
        self.reads_hidden = config.use_gating

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values: two tensors ``(batch, heads, length, head size)``."""
        (pool,), rows = self.pool, hidden.shape[0]
        ready = pool.kept.get(self.pool, pool.ready)
        if ready is None:
            states = pool.states(self.layer)[:, None, :, : self.length]
            keys, values = pool.dropout(states.expand(-1, rows, -1, -1, -1))
        else:
            keys, values = ready[self.layer]
            if rows > 1 or self.length < pool.length:
                shape = (rows, -1, self.length, -1)
                keys = keys[:, :, : self.length].expand(shape)
                values = values[:, :, : self.length].expand(shape)
        if self.gate is None:
            return keys, values
        gate = gate_scores(self, self.gate, hidden)[..., None, None]
        return keys * gate[:, 0], values * gate[:, -1]


class NoPrefix(AttentionPart):
    """Stands at a layer without a prefix that has to follow what other layers do."""

    length = 0
    reads_hidden = False


class PrefixTuningMethod(AdapterMethod):
    """Puts a `PrefixPart` at attention sites, and a pool for each kind of attention beside them."""

    config: PrefixTuningConfig

    def build(
        self, sites: Mapping[str, AttachedSite], model_config: PretrainedConfig
    ) -> dict[str, nn.Module]:
        check_leave_out(self.config.leave_out, sites)
        groups: dict[str, list[AttachedAttention]] = {}
        for site in sites.values():
            if isinstance(site, AttachedAttention) and self._takes(site):
                groups.setdefault(location(site), []).append(site)
        if not groups:
            raise lacking("Prefix tuning", ["self_attention"])
        parts: dict[str, nn.Module] = {}
        for word, members in groups.items():
            taken = [site for site in members if site.layer not in self.config.leave_out]
            if taken:
                parts |= self._build_group(word, taken)
            others = [site for site in members if site not in taken and site.shares_bias]
            parts |= {site.address: NoPrefix() for site in others if taken}
        return parts

    def _takes(self, site: AttachedAttention) -> bool:
        if site.role == "encoder_attention":
            return self.config.cross_prefix
        return site.side != "encoder" or self.config.encoder_prefix

    def _build_group(self, word: str, sites: Sequence[AttachedAttention]) -> dict[str, nn.Module]:
        config, first = self.config, sites[0]
        for site in sites:
            site.check_way_in()
        shape = (len(sites), first.key_heads, first.head_size)
        if any((s.key_heads, s.head_size) != shape[1:] for s in sites):
            raise UnsupportedError(
                f"The attention heads of {word} differ between layers, so they cannot share a pool."
            )
        lengths = [config.length(site.layer or 0) for site in sites]
        with seeded(config.init_weights_seed):
            pool: FlatPool | Pool
            if config.flat:
                pool = FlatPool(shape, max(lengths), config)
            else:
                pool = Pool(first.width, shape, max(lengths), config)
        parts: dict[str, nn.Module] = {f"shared.{word}": pool}
        for index, (site, length) in enumerate(zip(sites, lengths, strict=True)):
            with seeded(config.init_weights_seed):
                parts[site.address] = PrefixPart(pool, index, length, site.width, config)
        return parts


def location(site: AttachedAttention) -> str:
    """What kind of attention a site is, in the words of AdapterHub files."""
    if site.location is not None:
        return site.location
    if site.role == "encoder_attention":
        return "cross_prefix"
    return "encoder_prefix" if site.side == "encoder" else "self_prefix"
