"""Configurations of adapters in AdapterHub files of every age."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from flexheads.checkpoints.bundle import Layout
from flexheads.checkpoints.hub import lora

# Until its third generation the ancestor of the adapters library called the tanh approximation
# "gelu"; files without a version are older than that.
OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def hub_config(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """An adapter's configuration in fields that the `adapters` library knows."""
    if "configs" in config:  # a union
        members = [hub_config(member, layout) for member in config["configs"]]
        return {**config, "configs": members}
    if config.get("architecture") in lora.TAGS:
        return lora.hub_fields(config, layout)
    # The library has the first field too, but neither saves nor reads it.
    own = ("subtract_projection", "inv_adapter_late")
    return {key: value for key, value in config.items() if key not in own}


def modern_config(content: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The configuration in a saved adapter of any age, in the fields of today."""
    config = dict(content["config"])
    if "configs" in config:  # a union
        members = [modern_config({**content, "config": own}, layout) for own in config["configs"]]
        return {**config, "configs": members}
    version = content.get("version")
    nested = config.pop("invertible_adapter", None)
    if nested and content.get("type") != "text_task":
        # Task adapters of the first generation named one but never had its weights.
        config["inv_adapter"] = nested.get("block_type")
        config["inv_adapter_reduction_factor"] = nested.get("reduction_factor")
    if config.get("inv_adapter") and "late_embeddings" in layout.paths:
        config["inv_adapter_late"] = str(version).startswith("adapters.")
    if "reduction_factor" in config and content.get("hidden_size"):
        config["reduction_factor"] = _fitting(config["reduction_factor"], content["hidden_size"])
    if version is None and "non_linearity" in config:
        word = config["non_linearity"]
        config["non_linearity"] = OLD_ACTIVATIONS.get(word, word)
    if config.get("architecture") == "lora" and _is_unscaled(str(version)):
        config = lora.scaled_as_before(config, layout)
    if config.get("architecture") in lora.TAGS:
        if layout.interleaved and "flexheads" not in content:
            lora.check_whole(config)
        config = lora.own_fields(config, layout)
    return config


def _fitting(factor: Any, width: int) -> Any:
    """A reduction factor of no more than the hidden size: the library has no bottleneck below 1."""
    if isinstance(factor, Mapping):
        return {key: _fitting(value, width) for key, value in factor.items()}
    return width if isinstance(factor, (int, float)) and factor > width else factor


def _is_unscaled(version: str) -> bool:
    """Whether a LoRA of that library version did not always scale by ``alpha / r``."""
    match = re.fullmatch(r"adapters\.(\d+)\.(\d+).*", version)
    return match is not None and (int(match[1]), int(match[2])) < (1, 1)
