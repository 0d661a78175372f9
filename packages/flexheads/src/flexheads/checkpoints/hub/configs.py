"""Configurations of adapters in AdapterHub files of every age."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Until its third generation the ancestor of the adapters library called the tanh approximation
# "gelu"; files without a version are older than that.
OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def hub_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter's configuration in fields that the `adapters` library knows."""
    config = dict(config)
    if config.pop("rank_stabilized", False):
        # alpha / sqrt(r) is what alpha * sqrt(r) over r gives.
        config["alpha"] = config["alpha"] * config["r"] ** 0.5
    return config


def modern_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in a saved adapter of any age, in the fields of today."""
    config = dict(content["config"])
    version = content.get("version")
    nested = config.pop("invertible_adapter", None)
    if nested and content.get("type") != "text_task":
        # Task adapters of the first generation named one but never had its weights.
        config["inv_adapter"] = nested.get("block_type")
        config["inv_adapter_reduction_factor"] = nested.get("reduction_factor")
    if version is None and "non_linearity" in config:
        word = config["non_linearity"]
        config["non_linearity"] = OLD_ACTIVATIONS.get(word, word)
    if config.get("architecture") == "lora" and _is_unscaled(str(version)):
        config["alpha"] = config["r"]
    return config


def _is_unscaled(version: str) -> bool:
    """Whether a LoRA of that library version did not scale by ``alpha / r``, as until 1.0.1."""
    match = re.fullmatch(r"adapters\.(\d+)\.(\d+).*", version)
    return match is not None and (int(match[1]), int(match[2])) < (1, 1)
