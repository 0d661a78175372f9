"""What methods on linear projections share: which projections, and how a part is folded in."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.base import AdapterMethod, check_leave_out, seeded
from flexheads.methods.config import AdapterConfig
from flexheads.sites.base import AttachedSite
from flexheads.sites.linear import AttachedLinear, LinearPart
from flexheads.sites.projection import Projection

MATRICES = {"q": "query", "k": "key", "v": "value", "o": "attention_output"}
"""The letters of attention matrices, each with the role of its site."""


@dataclasses.dataclass(frozen=True, eq=False)
class ProjectionConfig(AdapterConfig):
    """Base class of configurations that choose linear projections.

    Attributes:
        attn_matrices: The attention projections to adapt; any of ``"q", "k", "v", "o"``. Those of
            a decoder's cross-attention are included.
        intermediate: Adapt the first projection of the feed-forward network.
        output: Adapt its second projection.
        leave_out: Numbers of the layers that get no adapter.
        init_weights_seed: Seed for each part.
    """

    attn_matrices: Sequence[str] = ("q", "v")
    intermediate: bool = False
    output: bool = False
    leave_out: Sequence[int] = ()
    init_weights_seed: int | None = None

    def __post_init__(self) -> None:
        if wrong := self.problems():
            raise ConfigError(f"{type(self).__name__}: {'; '.join(wrong)}.")

    def problems(self) -> list[str]:
        """What is wrong with the fields, each in a few words; subclasses add theirs."""
        unknown = [matrix for matrix in self.attn_matrices if matrix not in MATRICES]
        return [f"attn_matrices names {unknown}; known are {list(MATRICES)}"] if unknown else []

    @property
    def roles(self) -> list[str]:
        """The roles of the projections that it adapts; those of a cross-attention come on top."""
        roles = [MATRICES[matrix] for matrix in self.attn_matrices]
        return roles + ["mlp_in"] * self.intermediate + ["mlp_out"] * self.output


class ProjectionPart(LinearPart):
    """A part at a projection that knows how it is folded into the weight."""

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The projection's weight ``(out, in)`` and bias with this part folded in.

        Raises:
            UnsupportedError: If that is impossible.
        """
        raise UnsupportedError(f"{type(self).__name__} cannot be merged into the backbone.")


class ProjectionMethod(AdapterMethod):
    """Base class of methods that put one part at each projection of a `ProjectionConfig`."""

    config: ProjectionConfig

    @abstractmethod
    def part(self, site: AttachedLinear) -> ProjectionPart:
        """Builds the part at one projection.

        Raises:
            ConfigError: If the configuration does not fit the projection's size.
        """

    def build(
        self, sites: Mapping[str, AttachedSite], model_config: PretrainedConfig
    ) -> dict[str, nn.Module]:
        config, name = self.config, type(self.config).__name__
        check_leave_out(config.leave_out, sites)
        linear = [site for site in sites.values() if isinstance(site, AttachedLinear)]
        present = {site.role for site in linear}
        if missing := [role for role in config.roles if role not in present]:
            raise UnsupportedError(
                f"This architecture names no projection for {', '.join(missing)}; "
                f"it has {', '.join(sorted(present)) or 'none'}."
            )
        if not config.roles:
            raise ConfigError(
                f"This {name} adapts nothing: name some attn_matrices, or switch on intermediate "
                "or output."
            )
        parts: dict[str, nn.Module] = {}
        for site in linear:
            if (
                site.role.removeprefix("cross_") in config.roles
                and site.layer not in config.leave_out
            ):
                with seeded(config.init_weights_seed):
                    parts[site.address] = self.part(site)
        return parts

    def merged(
        self, part: nn.Module, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert isinstance(part, ProjectionPart)
        return part.merged(weight, bias)


@dataclasses.dataclass(frozen=True, eq=False)
class DeltaConfig(ProjectionConfig):
    """Base class of configurations of an added weight that is made of smaller matrices.

    Attributes:
        r: The rank.
        alpha: Numerator of the scaling ``alpha / r``.
        rank_dropout: Probability of leaving out a row of the added weight in training.
        module_dropout: Probability of leaving out all of it in training.
        init_weights: Whether the added weight is zero at the start; else it is random.
    """

    r: int = 8
    alpha: float = 8
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    init_weights: bool | str = True

    def problems(self) -> list[str]:
        wrong = super().problems()
        if isinstance(self.r, bool) or self.r != int(self.r) or self.r < 1:
            wrong.append(f"r={self.r!r} must be a positive whole number")
        for name in ("rank_dropout", "module_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                wrong.append(f"{name}={getattr(self, name)!r} must be in [0, 1)")
        if self.init_weights not in self.initialisations:
            known = ", ".join(map(repr, self.initialisations))
            wrong.append(f"init_weights={self.init_weights!r} is none of {known}")
        return wrong

    @property
    def initialisations(self) -> tuple[Any, ...]:
        """The values that `init_weights` may have."""
        return (True, False)


class DeltaPart(ProjectionPart):
    """``y + D x`` with a weight ``D`` of ``(out, in)``, of which subclasses say how it is made.

    Args:
        config: The configuration.
        rescaled: Whether rows that rank dropout keeps are scaled up, by the share of them.
    """

    def __init__(self, config: DeltaConfig, rescaled: bool) -> None:
        super().__init__()
        self.scaling = config.alpha / config.r
        self.rank_dropout, self.module_dropout = config.rank_dropout, config.module_dropout
        self.rescaled = rescaled

    def delta(self) -> Tensor:
        """The added weight, ``(out_features, in_features)``."""
        raise NotImplementedError

    def product(self, hidden: Tensor) -> Tensor:
        """The added weight applied: ``(..., in_features)`` to ``(..., out_features)``."""
        return functional.linear(hidden, self.delta())

    def forward(self, hidden: Tensor, output: Tensor, projection: Projection) -> Tensor:
        """Maps the projection's input and result to the new result."""
        product = self.product(hidden)
        if self.training and self.module_dropout:
            product = product * (torch.rand(1, device=product.device) > self.module_dropout)
        if self.training and self.rank_dropout:
            product = product * self._kept_rows(product)
        return output + product

    def _kept_rows(self, product: Tensor) -> Tensor:
        """One for the rows that stay and zero for others, perhaps rescaled: ``(out_features,)``."""
        rows = product.shape[-1]
        kept = (torch.rand(rows, device=product.device) > self.rank_dropout).to(product.dtype)
        # The bound only counts where no row stays.
        return kept / kept.mean().clamp_min(1 / rows) if self.rescaled else kept

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta(), bias


def draw_(parameter: Tensor) -> None:
    """Draws from the uniform distribution in which torch initialises linear layers."""
    nn.init.kaiming_uniform_(parameter, a=5**0.5)
