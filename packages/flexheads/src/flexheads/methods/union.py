"""Unions: several methods at once, under one adapter's name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from flexheads.errors import ConfigError
from flexheads.methods.base import AdapterMethod
from flexheads.methods.bottleneck_config import BnConfig, ParBnConfig, SeqBnConfig
from flexheads.methods.config import AdapterConfig, load_config
from flexheads.methods.lora_configs import LoRAConfig
from flexheads.methods.prefix_tuning import PrefixTuningConfig
from flexheads.plugins import registry, resolve
from flexheads.sites.base import AttachedSite


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class ConfigUnion(AdapterConfig):
    """Several configurations that make up one adapter.

    ``union[0]`` is the first; ``union["0.dropout"]`` is a field of it.

    Args:
        configs: The configurations, of methods that do not get in each other's way.

    Raises:
        ConfigError: If one is no configuration or a union itself, or if two are of one method and
            nothing keeps them apart.
    """

    architecture: ClassVar[str | None] = "union"

    configs: tuple[AdapterConfig, ...]

    def __init__(self, *configs: AdapterConfig) -> None:
        _check(configs)
        object.__setattr__(self, "configs", tuple(configs))

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            return self.configs[key]
        number, dot, field = str(key).partition(".")
        if dot and number.isdecimal() and int(number) < len(self.configs):
            return self.configs[int(number)][field]
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return (f"{number}.{key}" for number, c in enumerate(self.configs) for key in c)

    def __len__(self) -> int:
        return sum(len(config) for config in self.configs)

    def to_dict(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "configs": [config.to_dict() for config in self.configs],
        }

    def replace(self, **changes: Any) -> ConfigUnion:
        """A union with other values for some fields.

        Args:
            changes: A field (``dropout``) is changed in every member that has it, a field with a
                number (``"0.dropout"``) in that member.

        Raises:
            ConfigError: If a field does not exist.
        """
        own: list[dict[str, Any]] = [{} for _ in self.configs]
        for key, value in changes.items():
            places = [(n, key) for n, config in enumerate(self.configs) if key in config]
            if key in self:
                number, _, field = key.partition(".")
                places = [(int(number), field)]
            if not places:
                raise ConfigError(f"No member of {self!r} has a field {key!r}.")
            for number_, field_ in places:
                own[number_][field_] = value
        return ConfigUnion(*(c.replace(**new) for c, new in zip(self.configs, own, strict=True)))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, tolerant: bool = False) -> Any:
        if not isinstance(fields.get("configs"), (list, tuple)):
            raise ConfigError(f'A union needs a list "configs", not {fields.get("configs")!r}.')
        members = (load_config(member, tolerant=tolerant) for member in fields["configs"])
        return ConfigUnion(*members)


class MAMConfig(ConfigUnion):
    """Mix-and-match adapters (He et al. 2021, arXiv:2110.04366): prefixes and a parallel adapter.

    Args:
        prefix_tuning: The prefixes; None is the paper's bottleneck of 800.
        adapter: The adapter; None is the paper's.
    """

    def __init__(
        self, prefix_tuning: PrefixTuningConfig | None = None, adapter: BnConfig | None = None
    ) -> None:
        super().__init__(
            prefix_tuning or PrefixTuningConfig(bottleneck_size=800), adapter or ParBnConfig()
        )


class UniPELTConfig(ConfigUnion):
    """UniPELT (Mao et al. 2022, arXiv:2110.07577): prefixes, an adapter and LoRA, each gated.

    Args:
        prefix_tuning, adapter, lora: The members; None is the paper's.
    """

    def __init__(
        self,
        prefix_tuning: PrefixTuningConfig | None = None,
        adapter: BnConfig | None = None,
        lora: LoRAConfig | None = None,
    ) -> None:
        members = (
            prefix_tuning or PrefixTuningConfig(prefix_length=10),
            adapter or SeqBnConfig(reduction_factor=16),
            lora or LoRAConfig(r=8, alpha=2),
        )
        super().__init__(*(member.replace(use_gating=True) for member in members))


def _check(configs: tuple[Any, ...]) -> None:
    for config in configs:
        if isinstance(config, ConfigUnion) or not isinstance(config, AdapterConfig):
            what = "a union" if isinstance(config, ConfigUnion) else "no adapter configuration"
            raise ConfigError(
                f"A union holds configurations of single methods; {config!r} is {what}."
            )
    if not configs:
        raise ConfigError("A union needs at least one configuration.")
    for one, other in combinations(configs, 2):
        if one.tag != other.tag or one.get("leave_out") or other.get("leave_out"):
            continue  # with leave_out the layers of a model decide
        if isinstance(one, BnConfig) and isinstance(other, BnConfig):
            both = [f for f in ("mh_adapter", "output_adapter") if one[f] and other[f]]
            if not both:
                continue
        raise ConfigError(
            f"A union cannot hold both {one!r} and {other!r}: they act at the same places. Keep "
            "them apart with leave_out, or add two adapters and stack them."
        )


class UnionMethod(AdapterMethod):
    """Builds what each member builds, all in one adapter."""

    config: ConfigUnion

    def __init__(self, config: ConfigUnion) -> None:
        super().__init__(config)
        self.members = [resolve(registry().method_for_tag(c.tag).method)(c) for c in config.configs]
        self.built: list[list[nn.Module]] = []

    def build(
        self, sites: Mapping[str, AttachedSite], model_config: PretrainedConfig
    ) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {}
        self.built = []
        for number, member in enumerate(self.members):
            own = member.build(sites, model_config)
            if both := [address for address in own if address in parts]:
                raise ConfigError(
                    f"Member {number} of the union acts at {', '.join(both[:3])}, where an earlier "
                    "one acts already. Keep them apart with leave_out, or stack two adapters."
                )
            parts |= own
            self.built.append(list(own.values()))
        return parts

    def merged(
        self, part: nn.Module, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        for member, built in zip(self.members, self.built, strict=True):
            if any(own is part for own in built):
                merged: tuple[Tensor, Tensor | None] = member.merged(part, weight, bias)
                return merged
        return super().merged(part, weight, bias)
