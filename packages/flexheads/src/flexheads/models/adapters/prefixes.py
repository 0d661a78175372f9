"""Prefixes without the network that made them."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from flexheads.errors import ConfigError
from flexheads.methods.base import to_be_filled
from flexheads.methods.config import AdapterConfig
from flexheads.methods.prefix_tuning import Pool, PrefixTuningConfig
from flexheads.methods.union import ConfigUnion
from flexheads.models.adapters.mixin import AdapterModelMixin


class PrefixMixin(AdapterModelMixin):
    """``eject_prefix_tuning``."""

    def eject_prefix_tuning(self, name: str) -> None:
        """Replaces the network that makes an adapter's prefixes by the prefixes themselves.

        The outputs stay the same. The configuration becomes that of a flat adapter, so that it is
        saved and loaded as one.

        Args:
            name: The adapter's name.

        Raises:
            UnknownNameError: If there is none of that name.
            ConfigError: If it has no such network.
        """
        old = self.adapters[name]
        pools = {n: m for n, m in old.named_modules() if isinstance(m, Pool)}
        if not pools:
            raise ConfigError(f"Adapter {name!r} has no network that makes prefixes.")
        with to_be_filled():
            new = self._build_adapter(name, _flat(old.config))
        state = new.state_dict()
        with torch.no_grad():
            for key, tensor in old.state_dict().items():
                if key in state:
                    state[key].copy_(tensor)
            for address, pool in pools.items():
                state[f"{address}.control_trans"].copy_(pool.flattened())
        trains = any(p.requires_grad for p in old.parameters())
        nn.Module.requires_grad_(new, trains)
        self._install(new)


def _flat(config: AdapterConfig) -> AdapterConfig:
    """The configuration with flat prefixes."""
    if isinstance(config, PrefixTuningConfig):
        return dataclasses.replace(config, flat=True)
    assert isinstance(config, ConfigUnion)
    return ConfigUnion(
        *(_flat(c) if isinstance(c, PrefixTuningConfig) else c for c in config.configs)
    )
