"""Configurations of the bottleneck family, compacters and invertible adapters included."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from flexheads.errors import ConfigError
from flexheads.methods.config import AdapterConfig

PHM_STARTS = ("glorot-uniform", "glorot-normal", "normal", "phm")
"""What `BnConfig.hypercomplex_nonlinearity` may be."""


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
        init_weights: How the down-projection starts: ``"bert"`` (normal, 0.02), ``"mam_adapter"``
            (Kaiming uniform) or ``"houlsby"`` (truncated normal, 0.01). The up-projection is zero,
            so that a new adapter changes nothing; in the `adapters` library, ``"mam_adapter"``
            apart, it is as small as the down-projection and a new adapter changes a little.
        init_weights_seed: Seed for each part; all parts of one shape are then equal.
        is_parallel: Feed the adapter with the layer's residual (He et al. 2021, arXiv:2110.04366).
        scaling: Factor on the output: a number, or ``"learned"``, or ``"channel"``.
        use_gating: Multiply by a learned gate, averaged over the sequence (UniPELT).
        residual_before_ln: Where the skip around the adapter starts: before the layer norm (True),
            behind it (False), or behind the layer's own residual (``"post_add"``).
        adapter_residual_before_ln: Add that skip before `ln_after` instead of behind it.
        inv_adapter: ``"nice"`` (additive) or ``"glow"`` (affine) for an invertible adapter behind
            the embeddings.
        inv_adapter_reduction_factor: Reduction inside the invertible adapter.
        inv_adapter_late: Where positions are added to the embeddings of tokens outside of that
            module, act behind the sum, as the `adapters` library does; its files set this.
        cross_adapter: Adapt behind the cross-attention of decoder layers.
        leave_out: Numbers of the layers that get no adapter.
        dropout: Dropout on the output.
        phm_layer: Both projections are sums of Kronecker products (Compacter, Mahabadi et al.
            2021, arXiv:2106.04647); see `flexheads.methods.phm`.
        phm_dim: How many products are summed; it divides hidden size and bottleneck size.
        factorized_phm_W: The larger factors are products of rank `phm_rank`.
        shared_W_phm: The larger factors are shared by all layers.
        shared_phm_rule: The smaller factors are shared by all projections.
        factorized_phm_rule: The smaller factors are products of rank 1.
        phm_c_init: How the smaller factors start: ``"normal"`` or ``"uniform"``.
        phm_init_range: Standard deviation of shared smaller factors, and of larger ones that are
            ``"normal"``.
        learn_phm: Whether the smaller factors are trained.
        hypercomplex_nonlinearity: How the larger factors start: ``"glorot-uniform"``,
            ``"glorot-normal"``, ``"normal"``, or ``"phm"``, which is ``"glorot-normal"``.
        phm_rank: Rank of larger factors that are factorised.
        phm_bias: Whether the projections have biases.
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
    inv_adapter_late: bool = False

    def __post_init__(self) -> None:
        check = {
            "init_weights": self.init_weights in ("bert", "mam_adapter", "houlsby"),
            "scaling": self.scaling in ("learned", "channel") or is_number(self.scaling),
            "residual_before_ln": self.residual_before_ln in (True, False, "post_add"),
            "inv_adapter": self.inv_adapter in (None, "nice", "glow"),
            "dropout": 0.0 <= self.dropout < 1.0,
            "stochastic_depth": 0.0 <= self.stochastic_depth < 1.0,
            "phm_dim": _is_count(self.phm_dim),
            "phm_rank": _is_count(self.phm_rank),
            "phm_c_init": self.phm_c_init in ("normal", "uniform"),
            "hypercomplex_nonlinearity": self.hypercomplex_nonlinearity in PHM_STARTS,
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
        if not is_number(factor) or factor <= 0:
            raise ConfigError(f"reduction_factor={factor!r} must be a positive number.")
        return float(factor)


@dataclasses.dataclass(frozen=True, eq=False)
class SeqBnConfig(BnConfig):
    """One adapter a layer, behind the feed-forward (Pfeiffer et al. 2021, arXiv:2005.00247)."""

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
    """`DoubleSeqBnConfig` with an invertible adapter, as in MAD-X (arXiv:2005.00052)."""

    inv_adapter: Literal["nice", "glow"] | None = "nice"
    inv_adapter_reduction_factor: float | None = 2


@dataclasses.dataclass(frozen=True, eq=False)
class CompacterPlusPlusConfig(SeqBnConfig):
    """`SeqBnConfig` with hypercomplex projections (Compacter++, arXiv:2106.04647)."""

    phm_layer: bool = True
    reduction_factor: float | Mapping[str, float] = 32
    non_linearity: str = "gelu"


@dataclasses.dataclass(frozen=True, eq=False)
class CompacterConfig(DoubleSeqBnConfig):
    """`DoubleSeqBnConfig` with hypercomplex projections (Compacter, arXiv:2106.04647)."""

    phm_layer: bool = True
    reduction_factor: float | Mapping[str, float] = 32
    non_linearity: str = "gelu"


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


def is_number(value: Any) -> bool:
    """Whether a field holds a number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
