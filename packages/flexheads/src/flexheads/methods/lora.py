"""Low-rank adaptation and its relatives: which projections they take, and what they build there."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from transformers import PretrainedConfig

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.methods.base import AdapterMethod, check_leave_out, seeded
from flexheads.methods.lora_configs import (
    ANCHORED,
    MATRICES,
    DoRAConfig,
    DvoRAConfig,
    IA3Config,
    LoRAConfig,
    MTLLoRAConfig,
    VeraConfig,
)
from flexheads.methods.lora_parts import (
    Anchored,
    Delta,
    LowRank,
    Projections,
    Scaling,
    Vectors,
)
from flexheads.methods.mtl_lora import MultiTask
from flexheads.sites.base import AttachedSite
from flexheads.sites.derived import look_together
from flexheads.sites.linear import AttachedLinear
from flexheads.sites.projection import Projection

__all__ = [
    "Anchored",
    "Delta",
    "DoRAConfig",
    "DvoRAConfig",
    "IA3Config",
    "LoRAConfig",
    "LoRAMethod",
    "LowRank",
    "MTLLoRAConfig",
    "MultiTask",
    "Scaling",
    "Vectors",
    "VeraConfig",
]

SHARED = "shared.vera"
"""Where an adapter holds VeRA's shared matrices."""


class LoRAMethod(AdapterMethod):
    """Puts a part at each projection that the configuration names."""

    config: LoRAConfig

    def build(
        self, sites: Mapping[str, AttachedSite], model_config: PretrainedConfig
    ) -> dict[str, nn.Module]:
        config = self.config
        check_leave_out(config.leave_out, sites)
        linear = [site for site in sites.values() if isinstance(site, AttachedLinear)]
        roles = self._roles({site.role for site in linear})
        taken = [s for s in linear if s.role in roles and s.layer not in config.leave_out]
        parts: dict[str, nn.Module] = {}
        if config.is_vera and taken:
            widest = max(s.in_features for s in taken), max(s.out_features for s in taken)
            with seeded(config.init_weights_seed or 0):
                parts[SHARED] = Projections(*widest, config)
        for site in taken:
            with seeded(config.init_weights_seed):
                parts[site.address] = self._part(site.projection, parts.get(SHARED))
        if config.use_dora:
            look_together(vars(part)["kept"] for part in parts.values() if isinstance(part, Delta))
        return parts

    def _roles(self, present: set[str]) -> set[str]:
        """The roles of the projections that are adapted.

        Raises:
            ConfigError: If the configuration adapts nothing.
            UnsupportedError: If the architecture lacks one.
        """
        if not self.config.roles:
            raise ConfigError(
                "This LoRA adapts nothing: switch on selfattn_lora with some attn_matrices, "
                "intermediate_lora or output_lora."
            )
        if missing := [role for role in self.config.roles if role not in present]:
            letters = {role: f"{role} ({letter!r})" for letter, role in MATRICES.items()}
            raise UnsupportedError(
                "This architecture names no projection for "
                f"{', '.join(letters.get(role, role) for role in missing)}; it has "
                f"{', '.join(letters.get(role, role) for role in sorted(present)) or 'none'}."
            )
        across = {f"cross_{role}" for role in self.config.roles if role in MATRICES.values()}
        return {*self.config.roles, *across}

    def _part(self, projection: Projection, shared: nn.Module | None) -> nn.Module:
        config = self.config
        if isinstance(config, MTLLoRAConfig):
            return MultiTask(projection, config)
        if config.composition_mode == "scale":
            return Scaling(projection, config)
        if isinstance(shared, Projections):
            return Vectors(projection, config, shared)
        return (Anchored if config.init_weights in ANCHORED else LowRank)(projection, config)

    def merged(
        self, part: nn.Module, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if not isinstance(part, Scaling | Delta):
            raise UnsupportedError(f"A {type(part).__name__} cannot be merged into the backbone.")
        return part.merged(weight, bias)
