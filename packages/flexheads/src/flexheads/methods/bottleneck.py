"""Bottleneck adapters: a small two-layer network at the residual stream, in every known variant."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from flexheads.activations import activation
from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.base import AdapterMethod, check_leave_out, seeded
from flexheads.methods.config import AdapterConfig
from flexheads.methods.invertible import build_coupling
from flexheads.sites.base import AttachedSite
from flexheads.sites.residual import ResidualPart, Stream

_ROLES = {
    "mh_adapter": "attention",
    "cross_adapter": "cross_attention",
    "output_adapter": "feed_forward",
}


@dataclasses.dataclass(frozen=True, eq=False)
class BnConfig(AdapterConfig):
    """Base configuration of the bottleneck family (Houlsby et al. 2019, arXiv:1902.00751).

    Attributes:
        mh_adapter: Adapt behind the self-attention of each layer.
        output_adapter: Adapt behind the feed-forward network of each layer.
        reduction_factor: Hidden size over bottleneck size, or a map from layer number to it, with
            ``"default"`` for layers that it does not name.
        non_linearity: Activation inside the bottleneck.
        original_ln_before: Apply the layer's own residual and layer norm before the adapter.
        original_ln_after: Apply them after it.
        ln_before, ln_after: New layer norms before and after the bottleneck.
        init_weights: ``"bert"`` (normal, 0.02), ``"mam_adapter"`` (up-projection zero) or
            ``"houlsby"`` (truncated normal, 0.01).
        init_weights_seed: Seed for each part; all parts of one shape are then equal.
        is_parallel: Feed the adapter with the layer's residual (He et al. 2021, arXiv:2110.04366).
        scaling: Factor on the output: a number, or ``"learned"``, or ``"channel"``.
        use_gating: Multiply by a learned gate, averaged over the sequence (UniPELT).
        residual_before_ln: Where the skip around the adapter starts: before the layer norm (True),
            behind it (False), or behind the layer's own residual (``"post_add"``).
        adapter_residual_before_ln: Add that skip before `ln_after` instead of behind it.
        inv_adapter: ``"nice"`` or ``"glow"`` for an invertible adapter behind the embeddings.
        inv_adapter_reduction_factor: Reduction inside the invertible adapter.
        cross_adapter: Adapt behind the cross-attention of decoder layers.
        leave_out: Numbers of the layers that get no adapter.
        dropout: Dropout on the output.
        stochastic_depth: Probability of dropping a row's adapter output in training.
    """

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: float | Mapping[str, float]
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "bert"
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | Literal["learned", "channel"] = 1.0
    use_gating: bool = False
    residual_before_ln: bool | Literal["post_add"] = True
    adapter_residual_before_ln: bool = False
    inv_adapter: Literal["nice", "glow"] | None = None
    inv_adapter_reduction_factor: float | None = None
    cross_adapter: bool = False
    leave_out: Sequence[int] = ()
    dropout: float = 0.0
    phm_layer: bool = False
    phm_dim: int = 4
    factorized_phm_W: bool = True
    shared_W_phm: bool = False
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    phm_c_init: str = "normal"
    phm_init_range: float = 0.0001
    learn_phm: bool = True
    hypercomplex_nonlinearity: str = "glorot-uniform"
    phm_rank: int = 1
    phm_bias: bool = True
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        check = {
            "init_weights": self.init_weights in ("bert", "mam_adapter", "houlsby"),
            "scaling": self.scaling in ("learned", "channel") or _is_number(self.scaling),
            "residual_before_ln": self.residual_before_ln in (True, False, "post_add"),
            "inv_adapter": self.inv_adapter in (None, "nice", "glow"),
            "dropout": 0.0 <= self.dropout < 1.0,
            "stochastic_depth": 0.0 <= self.stochastic_depth < 1.0,
        }
        if wrong := [name for name, right in check.items() if not right]:
            values = ", ".join(f"{name}={getattr(self, name)!r}" for name in wrong)
            raise ConfigError(f"{type(self).__name__}: {values} is not a legal value.")
        has_skip = self.residual_before_ln == "post_add" and not self.is_parallel
        if has_skip and not self.original_ln_before:
            raise ConfigError(
                f'{type(self).__name__}: residual_before_ln="post_add" takes the skip behind the '
                "layer's residual, which needs original_ln_before=True."
            )

    def factor(self, layer: int) -> float:
        """The reduction factor of one layer.

        Raises:
            ConfigError: If the map has none for it, or the number is not positive.
        """
        factor: Any = self.reduction_factor
        if isinstance(factor, Mapping):
            named = {str(key): value for key, value in factor.items()}
            factor = named.get(str(layer), named.get("default"))
            if factor is None:
                raise ConfigError(
                    f"reduction_factor={dict(named)} has no value for layer {layer}; add one, or "
                    'a "default".'
                )
        if not _is_number(factor) or factor <= 0:
            raise ConfigError(f"reduction_factor={factor!r} must be a positive number.")
        return float(factor)


@dataclasses.dataclass(frozen=True, eq=False)
class SeqBnConfig(BnConfig):
    """One adapter a layer, behind the feed-forward network (Pfeiffer et al. 2020)."""

    original_ln_before: bool = True
    residual_before_ln: bool | Literal["post_add"] = True
    mh_adapter: bool = False
    output_adapter: bool = True
    non_linearity: str = "relu"
    reduction_factor: float | Mapping[str, float] = 16


@dataclasses.dataclass(frozen=True, eq=False)
class DoubleSeqBnConfig(BnConfig):
    """Two adapters a layer, behind attention and feed-forward network (Houlsby et al. 2019)."""

    original_ln_before: bool = False
    mh_adapter: bool = True
    output_adapter: bool = True
    non_linearity: str = "swish"
    reduction_factor: float | Mapping[str, float] = 16


@dataclasses.dataclass(frozen=True, eq=False)
class ParBnConfig(BnConfig):
    """An adapter parallel to the feed-forward network (He et al. 2021, arXiv:2110.04366)."""

    mh_adapter: bool = False
    output_adapter: bool = True
    non_linearity: str = "relu"
    reduction_factor: float | Mapping[str, float] = 2
    init_weights: str = "mam_adapter"
    is_parallel: bool = True
    scaling: float | Literal["learned", "channel"] = 4.0


@dataclasses.dataclass(frozen=True, eq=False)
class SeqBnInvConfig(SeqBnConfig):
    """`SeqBnConfig` with an invertible adapter behind the embeddings (MAD-X, arXiv:2005.00052)."""

    inv_adapter: Literal["nice", "glow"] | None = "nice"
    inv_adapter_reduction_factor: float | None = 2


@dataclasses.dataclass(frozen=True, eq=False)
class DoubleSeqBnInvConfig(DoubleSeqBnConfig):
    """`DoubleSeqBnConfig` with an invertible adapter behind the embeddings."""

    inv_adapter: Literal["nice", "glow"] | None = "nice"
    inv_adapter_reduction_factor: float | None = 2


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterPlusConfig(BnConfig):
    """Adapter+ (Steitz and Roth 2024, arXiv:2406.06820)."""

    original_ln_after: bool = False
    original_ln_before: bool = True
    residual_before_ln: bool | Literal["post_add"] = False
    stochastic_depth: float = 0.1
    init_weights: str = "houlsby"
    scaling: float | Literal["learned", "channel"] = "channel"
    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | Mapping[str, float] = 96
    non_linearity: str = "gelu"


class Bottleneck(ResidualPart):
    """One bottleneck at one residual site.

    ``delta(h) = scaling * up(act(down(h)))``, with the norms, dropout and gate that are configured.

    Args:
        width: Hidden size of the model.
        size: Size of the bottleneck.
        config: The adapter's configuration.
    """

    def __init__(self, width: int, size: int, config: BnConfig) -> None:
        super().__init__()
        self.config = config
        self.norm_before = nn.LayerNorm(width) if config.ln_before else None
        self.down = nn.Linear(width, size)
        self.activation = activation(config.non_linearity) or nn.Identity()
        self.up = nn.Linear(size, width)
        self.norm_after = nn.LayerNorm(width) if config.ln_after else None
        self.gate = nn.Linear(width, 1) if config.use_gating else None
        self.dropout = nn.Dropout(config.dropout)
        self.scaling: nn.Parameter | float
        if isinstance(config.scaling, str):
            self.scaling = nn.Parameter(torch.ones(1 if config.scaling == "learned" else width))
        else:
            self.scaling = float(config.scaling)
        self.skips_inside = (
            config.ln_after and config.adapter_residual_before_ln and not config.is_parallel
        )
        self.replaces_norm = not config.original_ln_after
        self.sees = "r" if config.is_parallel else "normed" if config.original_ln_before else "x"
        self.needs = self._needs()
        self._initialise()

    def _needs(self) -> frozenset[str]:
        config = self.config
        if config.is_parallel:
            needs, around_x = {"r"}, True
        else:
            needs = {"total" if config.original_ln_before else "x"}
            around_x = config.residual_before_ln is True or not config.original_ln_before
        if self.skips_inside or not around_x:
            needs.add("r")
        if around_x and (self.skips_inside or self.replaces_norm):
            needs.add("x")
        return frozenset(needs)

    def _initialise(self) -> None:
        kind, linears = self.config.init_weights, [self.down, self.up]
        for linear in (
            [*linears, self.gate] if self.gate is not None and kind != "houlsby" else linears
        ):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if kind == "mam_adapter":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)
        elif kind == "houlsby":
            for linear in linears:
                nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)

    def enter(self, stream: Stream) -> tuple[Tensor, Tensor | None]:
        """What it looks at, and what it adds to (None for the sub-layer's result)."""
        total: Any
        total, x, r, norm = stream  # those in `needs` are there
        config = self.config
        if config.is_parallel:
            return r, None  # type: ignore[return-value]
        if not config.original_ln_before:
            return x, None  # type: ignore[return-value]
        hidden: Tensor = total if norm is None else norm(total)
        if config.residual_before_ln is True:
            return hidden, None
        return hidden, total if config.residual_before_ln == "post_add" else hidden

    def fused(self, hidden: Tensor) -> Tensor:
        """The scaled output, without dropout, gate and norm: what AdapterFusion attends to."""
        config = self.config
        inner = hidden if self.norm_before is None else self.norm_before(hidden)
        up: Tensor = self.up(self.activation(self.down(inner)))
        if self.training and config.stochastic_depth > 0.0:
            up = _drop_rows(up, config.stochastic_depth)
        return up * self.scaling if config.scaling != 1 else up

    def delta(self, hidden: Tensor) -> Tensor:
        """What the bottleneck adds: ``(batch, sequence, width)`` to the same."""
        delta: Tensor = self.dropout(self.fused(hidden))
        if self.gate is not None:
            delta = delta * torch.sigmoid(self.gate(hidden)).mean(dim=1).unsqueeze(-1)
        return delta

    def forward(self, stream: Stream) -> Stream:
        """Adapts the residual stream; see `flexheads.sites.residual.Stream`."""
        hidden, skip = self.enter(stream)
        delta = self.delta(hidden)
        x: Any = stream.x if skip is None else skip
        if self.skips_inside:
            delta = delta + x
        if self.norm_after is not None:
            delta = self.norm_after(delta)
        if self.skips_inside:
            r: Any = stream.r
            return Stream(delta + r, delta, r, stream.norm)
        return stream.add(delta, skip)


class BottleneckMethod(AdapterMethod):
    """Puts a `Bottleneck` at the residual sites, and a coupling block behind the embeddings."""

    config: BnConfig

    def build(
        self, sites: Mapping[str, AttachedSite], model_config: PretrainedConfig
    ) -> dict[str, nn.Module]:
        config = self.config
        if config.phm_layer:
            raise UnsupportedError(
                "phm_layer=True (compacter) is not available in this version of flexheads."
            )
        check_leave_out(config.leave_out, sites)
        parts: dict[str, nn.Module] = {}
        if config.inv_adapter is not None:
            parts |= build_coupling(sites, config)
        roles = [role for field, role in _ROLES.items() if getattr(config, field)]
        for role in roles:
            taken = [s for s in sites.values() if s.role == role and s.kind == "residual"]
            if not taken and role != "cross_attention":
                raise UnsupportedError(f"This architecture has no {role} site for a bottleneck.")
            for site in taken:
                if site.layer not in config.leave_out:
                    parts[site.address] = self._build_part(site)
        return parts

    def _build_part(self, site: AttachedSite) -> nn.Module:
        assert site.layer is not None
        size = max(1, int(site.width / self.config.factor(site.layer)))
        with seeded(self.config.init_weights_seed):
            return Bottleneck(site.width, size, self.config)


def _drop_rows(tensor: Tensor, probability: float) -> Tensor:
    """Zeroes rows of the batch and scales up the rest (Huang et al. 2016, arXiv:1603.09382)."""
    shape = (tensor.shape[0],) + (1,) * (tensor.dim() - 1)
    keep = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return tensor * keep.bernoulli_(1.0 - probability).div_(1.0 - probability)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
