"""Which translation of names each method has in AdapterHub files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexheads.checkpoints.bundle import Layout
from flexheads.checkpoints.hub.bottleneck import BottleneckNames
from flexheads.checkpoints.hub.lora import LoRANames
from flexheads.checkpoints.hub.names import AdapterNames
from flexheads.checkpoints.hub.plain import PlainNames
from flexheads.checkpoints.hub.prefix_tuning import PrefixTuningNames
from flexheads.checkpoints.hub.prompt_tuning import PromptTuningNames
from flexheads.checkpoints.hub.reft import ReftNames
from flexheads.checkpoints.hub.union import UnionNames

_NAMES: dict[str | None, type[AdapterNames]] = {
    None: BottleneckNames,
    "lora": LoRANames,
    "mtl_lora": LoRANames,
    "prefix_tuning": PrefixTuningNames,
    "prompt_tuning": PromptTuningNames,
    "reft": ReftNames,
}
"""By the key ``"architecture"`` of a configuration; others are written under their own names."""


def adapter_names(
    name: str, config: Mapping[str, Any], layout: Layout, *, old: bool = False
) -> AdapterNames:
    """The translation for an adapter; see `AdapterNames` for the arguments."""
    if config.get("architecture") == "union":
        return UnionNames(
            name, config, layout, old=old, member=lambda c: adapter_names(name, c, layout, old=old)
        )
    kind = _NAMES.get(config.get("architecture"), PlainNames)
    return kind(name, config, layout, old=old)
