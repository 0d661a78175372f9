"""Bottleneck adapters: a small two-layer network at the residual stream, in every known variant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from flexheads.activations import activation
from flexheads.errors import ConfigError
from flexheads.methods.base import (
    AdapterMethod,
    awaits_values,
    check_layers,
    lacking,
    new_linear,
    seeded,
)
from flexheads.methods.bottleneck_bank import BottleneckBank
from flexheads.methods.bottleneck_config import BnConfig
from flexheads.methods.gating import gate_scores, new_gate
from flexheads.methods.invertible import build_coupling
from flexheads.methods.phm import PhmLinear, SharedPhm, check_phm
from flexheads.sites.base import AttachedSite
from flexheads.sites.direct import are_plain, quiet
from flexheads.sites.prepared import Step
from flexheads.sites.residual import ResidualPart, Stream

_ROLES = {
    "mh_adapter": "attention",
    "cross_adapter": "cross_attention",
    "output_adapter": "feed_forward",
}


class Bottleneck(ResidualPart):
    """One bottleneck at one residual site.

    ``delta(h) = scaling * up(act(down(h)))``, with the norms, dropout and gate that are configured.

    Args:
        width: Hidden size of the model.
        size: Size of the bottleneck.
        config: The adapter's configuration.
        shared: What its hypercomplex layers share with those of other sites, or None.
    """

    def __init__(
        self, width: int, size: int, config: BnConfig, shared: SharedPhm | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.norm_before = nn.LayerNorm(width) if config.ln_before else None
        self.down, self.up = _projections(width, size, config, shared)
        self.activation = activation(config.non_linearity) or nn.Identity()
        self.norm_after = nn.LayerNorm(width) if config.ln_after else None
        self.gate = new_gate(width) if config.use_gating else None
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
        kind = self.config.init_weights
        if not isinstance(self.down, nn.Linear) or not isinstance(self.up, nn.Linear):
            return  # hypercomplex layers draw their own
        if awaits_values():
            return
        if kind == "mam_adapter":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        elif kind == "houlsby":
            nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)
        else:
            nn.init.normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

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
        own: Any = self._modules  # quicker than attributes
        down, activation, up_again = own["down"], own["activation"], own["up"]
        if are_plain(down, up_again) and quiet(down, activation, up_again):
            inner = activation.forward(functional.linear(inner, **down._parameters))
            up = functional.linear(inner, **up_again._parameters)
        else:
            up = up_again(activation(down(inner)))
        if self.training and config.stochastic_depth > 0.0:
            up = _drop_rows(up, config.stochastic_depth)
        return up * self.scaling if config.scaling != 1 else up

    def delta(self, hidden: Tensor) -> Tensor:
        """What the bottleneck adds: ``(batch, sequence, width)`` to the same."""
        delta = self.fused(hidden)
        dropout: Any = self._modules["dropout"]
        if (dropout.training and dropout.p) or not quiet(dropout):
            delta = dropout(delta)
        if self.gate is not None:
            delta = delta * gate_scores(self, self.gate, hidden)
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

    def prepared(self) -> Step | None:
        config, norms = self.config, (self.norm_before, self.norm_after)
        plain = type(self) is Bottleneck and are_plain(self.down, self.up)
        draws = (self.dropout.training and self.dropout.p) or (
            self.training and config.stochastic_depth
        )
        if not plain or draws or any((*norms, self.gate, self.skips_inside)):
            return None
        weights: Any = *self.down._parameters.values(), *self.up._parameters.values()
        (down, bias, up, offset), linear = weights, functional.linear
        activate, scaling = self.activation.forward, self.scaling
        normed, scaled = self.sees == "normed", config.scaling != 1
        adds_to_seen = config.residual_before_ln not in (True, "post_add")

        def step(norm: Any, given: Tensor) -> Tensor:
            hidden = norm.forward(given) if normed else given
            delta = linear(activate(linear(hidden, down, bias)), up, offset)
            if scaled:
                delta = delta * scaling
            return delta + (hidden if adds_to_seen else given)

        return step

    def bank(self, parts: Sequence[ResidualPart | None]) -> BottleneckBank | None:
        if None in parts and not self._adds_to_x:
            return None  # a row without an adapter is more than one to which nothing is added
        alike = all(part is None or self._is_alike(part) for part in parts)
        return BottleneckBank(parts) if alike else None  # type: ignore[arg-type]

    @property
    def _adds_to_x(self) -> bool:
        """Whether it does nothing but add to the sub-layer's result."""
        config = self.config
        around_x = config.residual_before_ln is True or not config.original_ln_before
        return not self.replaces_norm and (config.is_parallel or around_x)

    def _is_alike(self, part: ResidualPart) -> bool:
        """Whether another part differs in its numbers only, so that both can be one product."""
        return (
            type(part) is Bottleneck
            and type(self.down) is type(part.down) is nn.Linear
            and self.down.weight.shape == part.down.weight.shape
            and not any((part.norm_before, part.norm_after, part.gate))
            and _kind(part) == _kind(self)
        )


def _kind(part: Bottleneck) -> tuple[object, ...]:
    """What of a bottleneck without norms and gates is no number that it learns."""
    config = part.config
    scaling = part.scaling.shape if isinstance(part.scaling, nn.Parameter) else None
    return (
        part.sees,
        part.needs,
        part.replaces_norm,
        config.residual_before_ln,
        config.non_linearity,
        config.stochastic_depth,
        part.dropout.p,
        scaling,
    )


class BottleneckMethod(AdapterMethod):
    """Puts a `Bottleneck` at the residual sites, and a coupling block behind the embeddings."""

    config: BnConfig

    def build(
        self, sites: Mapping[str, AttachedSite], model_config: PretrainedConfig
    ) -> dict[str, nn.Module]:
        config = self.config
        check_layers("leave_out", config.leave_out, sites)
        if isinstance(config.reduction_factor, Mapping):
            named = [key for key in config.reduction_factor if key != "default"]
            check_layers("reduction_factor", named, sites)
        parts: dict[str, nn.Module] = {}
        if config.inv_adapter is not None:
            parts |= build_coupling(sites, config)
        sizes = {
            site.address: self._size(site)
            for role in (role for field, role in _ROLES.items() if getattr(config, field))
            for site in self._sites_of(role, sites)
            if site.layer not in config.leave_out
        }
        shared = None
        if config.phm_layer and sizes:
            check_phm(config, {(sites[address].width, size) for address, size in sizes.items()})
            with seeded(config.init_weights_seed):
                shared = SharedPhm(*next((sites[a].width, n) for a, n in sizes.items()), config)
        for address, size in sizes.items():
            with seeded(config.init_weights_seed):
                parts[address] = Bottleneck(sites[address].width, size, config, shared)
        if shared is not None and shared.state_dict():
            parts["shared.phm"] = shared
        return parts

    def _sites_of(self, role: str, sites: Mapping[str, AttachedSite]) -> list[AttachedSite]:
        taken = [s for s in sites.values() if s.role == role and s.kind == "residual"]
        if not taken and role != "cross_attention":
            raise lacking("A bottleneck adapter", [role])
        return taken

    def _size(self, site: AttachedSite) -> int:
        """The size of the bottleneck at a site.

        Raises:
            ConfigError: If nothing would be left of it.
        """
        assert site.layer is not None
        factor = self.config.factor(site.layer)
        size = int(site.width / factor)
        if size < 1:
            raise ConfigError(
                f"reduction_factor={factor:g} leaves nothing of the hidden size {site.width} at "
                f"{site.address}; it must not be larger than the hidden size."
            )
        return size


def _projections(
    width: int, size: int, config: BnConfig, shared: SharedPhm | None
) -> tuple[nn.Module, nn.Module]:
    """The down-projection and the up-projection."""
    if not config.phm_layer:
        return new_linear(width, size), new_linear(size, width)
    return (
        PhmLinear(width, size, "down", config, shared),
        PhmLinear(size, width, "up", config, shared),
    )


def _drop_rows(tensor: Tensor, probability: float) -> Tensor:
    """Zeroes rows of the batch and scales up the rest (Huang et al. 2016, arXiv:1603.09382)."""
    shape = (tensor.shape[0],) + (1,) * (tensor.dim() - 1)
    keep = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return tensor * keep.bernoulli_(1.0 - probability).div_(1.0 - probability)
