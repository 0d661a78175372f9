"""Low-rank adaptation: a product of two small matrices on a projection, added or scaling it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.base import AdapterMethod, check_leave_out, seeded
from flexheads.methods.config import AdapterConfig
from flexheads.sites.base import AttachedSite
from flexheads.sites.linear import AttachedLinear, LinearPart, Projection

_MATRICES = {"q": "query", "k": "key", "v": "value", "o": "attention_output"}


@dataclasses.dataclass(frozen=True, eq=False)
class LoRAConfig(AdapterConfig):
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        selfattn_lora: Adapt the attention projections that `attn_matrices` names.
        intermediate_lora: Adapt the first projection of the feed-forward network.
        output_lora: Adapt its second projection.
        leave_out: Numbers of the layers that get no adapter.
        r: The rank.
        alpha: Numerator of the scaling ``alpha / r``.
        dropout: Dropout on the input of the product.
        attn_matrices: Any of ``"q", "k", "v", "o"``.
        composition_mode: ``"add"`` adds the product to the projection's result; ``"scale"``
            multiplies the result with a vector (IA3, Liu et al. 2022, arXiv:2205.05638).
        init_weights: ``"lora"`` (B zero), ``"bert"`` (normal, 0.02) or ``"ia3"`` (ones).
        init_weights_seed: Seed for each part.
        use_gating: A learned gate, averaged over the sequence, in place of the scaling (UniPELT).
        rank_stabilized: Scale by ``alpha / sqrt(r)`` instead (Kalajdzievski 2023,
            arXiv:2312.03732).
    """

    architecture: ClassVar[str | None] = "lora"

    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: Sequence[int] = ()
    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    attn_matrices: Sequence[str] = ("q", "v")
    composition_mode: Literal["add", "scale"] = "add"
    init_weights: str = "lora"
    init_weights_seed: int | None = None
    use_gating: bool = False
    use_dora: bool = False
    vera_d: float | None = None
    vera_b: float | None = None
    dtype: str | None = None
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        wrong = []
        if self.r != int(self.r) or self.r < 1:
            wrong.append(f"r={self.r!r} must be a positive whole number")
        if self.composition_mode not in ("add", "scale"):
            wrong.append(f'composition_mode={self.composition_mode!r} is neither "add" nor "scale"')
        elif self.composition_mode == "scale" and (self.r != 1 or self.dropout):
            wrong.append('composition_mode="scale" is a vector: it needs r=1 and no dropout')
        if self.init_weights not in ("lora", "bert", "ia3", "vera"):
            wrong.append(f"init_weights={self.init_weights!r} is unknown")
        if unknown := [m for m in self.attn_matrices if m not in _MATRICES]:
            wrong.append(f"attn_matrices names {unknown}; known are {list(_MATRICES)}")
        if not 0.0 <= self.dropout < 1.0:
            wrong.append(f"dropout={self.dropout!r} must be in [0, 1)")
        if wrong:
            raise ConfigError(f"{type(self).__name__}: {'; '.join(wrong)}.")

    @property
    def scaling(self) -> float:
        """The factor on the product."""
        if self.composition_mode == "scale":
            return self.alpha
        return self.alpha / (math.sqrt(self.r) if self.rank_stabilized else self.r)

    @property
    def roles(self) -> list[str]:
        """The projections that it adapts."""
        roles = [_MATRICES[matrix] for matrix in self.attn_matrices] if self.selfattn_lora else []
        return roles + ["mlp_in"] * self.intermediate_lora + ["mlp_out"] * self.output_lora


class _Gated(LinearPart):
    """What the additive and the scaling part share: the gate, or else the scaling."""

    def __init__(self, in_features: int, config: LoRAConfig) -> None:
        super().__init__()
        self.scaling = config.scaling
        self.gate = nn.Linear(in_features, 1) if config.use_gating else None
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=0.02)

    def factor(self, hidden: Tensor) -> Tensor | float:
        """The scaling, or the gate in its place: ``(batch, 1, 1)``."""
        if self.gate is None:
            return self.scaling
        return torch.sigmoid(self.gate(hidden)).mean(dim=1).unsqueeze(-1)


class LowRank(_Gated):
    """``y + scaling * B A x``; `lora_A` is ``(r, in)``, `lora_B` is ``(out, r)``."""

    def __init__(self, in_features: int, out_features: int, config: LoRAConfig) -> None:
        super().__init__(in_features, config)
        self.lora_A = nn.Parameter(torch.empty(config.r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, config.r))
        self.dropout = nn.Dropout(config.dropout)
        if config.init_weights == "lora":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        elif config.init_weights == "ia3":
            nn.init.ones_(self.lora_A)
            nn.init.ones_(self.lora_B)
        else:
            nn.init.normal_(self.lora_A, std=0.02)
            nn.init.normal_(self.lora_B, std=0.02)

    def forward(self, hidden: Tensor, output: Tensor, projection: Projection) -> Tensor:
        """Maps the projection's input and result to the new result."""
        product = functional.linear(
            functional.linear(self.dropout(hidden), self.lora_A), self.lora_B
        )
        return output + product * self.factor(hidden)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The projection's weight ``(out, in)`` and bias with this part folded in."""
        return weight + (self.lora_B @ self.lora_A) * self.scaling, bias


class Scaling(_Gated):
    """``y * (B * scaling)``; `lora_B` is ``(out, 1)``."""

    def __init__(self, in_features: int, out_features: int, config: LoRAConfig) -> None:
        super().__init__(in_features, config)
        self.lora_B = nn.Parameter(torch.ones(out_features, 1))
        if config.init_weights == "lora":
            nn.init.zeros_(self.lora_B)
        elif config.init_weights == "bert":
            nn.init.normal_(self.lora_B, std=0.02)

    def forward(self, hidden: Tensor, output: Tensor, projection: Projection) -> Tensor:
        """Maps the projection's input and result to the new result."""
        return output * (self.lora_B.view(-1) * self.factor(hidden))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The projection's weight ``(out, in)`` and bias with this part folded in."""
        scale = self.lora_B * self.scaling
        return weight * scale, None if bias is None else bias * scale.view(-1)


class LoRAMethod(AdapterMethod):
    """Puts a `LowRank` or a `Scaling` at the projections that the configuration names."""

    config: LoRAConfig

    def build(
        self, sites: Mapping[str, AttachedSite], model_config: PretrainedConfig
    ) -> dict[str, nn.Module]:
        config = self.config
        if config.use_dora or config.vera_d is not None or config.vera_b is not None:
            raise UnsupportedError("DoRA and VeRA are not available in this version of flexheads.")
        check_leave_out(config.leave_out, sites)
        present = {site.role for site in sites.values() if isinstance(site, AttachedLinear)}
        if missing := [role for role in config.roles if role not in present]:
            raise UnsupportedError(
                f"This architecture names no projection for {', '.join(missing)}; "
                f"it has {', '.join(sorted(present)) or 'none'}."
            )
        if not config.roles:
            raise ConfigError(
                "This LoRA adapts nothing: switch on selfattn_lora with some attn_matrices, "
                "intermediate_lora or output_lora."
            )
        kind = Scaling if config.composition_mode == "scale" else LowRank
        parts: dict[str, nn.Module] = {}
        for site in sites.values():
            if not isinstance(site, AttachedLinear) or site.role not in config.roles:
                continue
            if site.layer not in config.leave_out:
                with seeded(config.init_weights_seed):
                    parts[site.address] = kind(site.in_features, site.out_features, config)
        return parts

    def merged(
        self, part: nn.Module, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.config.use_gating:
            raise UnsupportedError("A gated LoRA depends on its input, so it cannot be merged.")
        weight, bias = part.merged(weight, bias)  # type: ignore[operator]
        return weight, bias
