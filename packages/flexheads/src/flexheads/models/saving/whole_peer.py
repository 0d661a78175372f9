"""Whole models that the `adapters` library has saved."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from packaging.version import Version
from torch import Tensor
from transformers import PretrainedConfig

from flexheads.checkpoints.hub.configs import modern_config
from flexheads.checkpoints.hub.fusion import FusionNames
from flexheads.checkpoints.hub.heads import HeadNames, modern_head_config
from flexheads.checkpoints.hub.methods import adapter_names
from flexheads.checkpoints.transfer import fill
from flexheads.methods.config import load_config
from flexheads.methods.fusion import AdapterFusionConfig

logger = logging.getLogger(__name__)


def describe_from_peer(config: PretrainedConfig) -> dict[str, Any] | None:
    """What a configuration says in the words of that library, or None."""
    adapters = getattr(config, "adapters", None)
    if not isinstance(adapters, Mapping) or "config_map" not in adapters:
        return None
    heads = getattr(config, "prediction_heads", None) or {}
    return {"peer": adapters, "heads": heads, "transformers": config.transformers_version}


def is_from_peer(described: Mapping[str, Any]) -> bool:
    """Whether a description is one of `describe_from_peer`."""
    return "peer" in described


def restore_from_peer(
    model: Any, path: str, description: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Builds and fills the adapters, fusions and heads that such a configuration describes.

    What was active is not in the files.

    Args:
        model: The model, with its backbone loaded.
        path: Where it was loaded from, for messages.
        description: What `describe_from_peer` gave.
        tensors: All tensors of the saved model.

    Raises:
        FlexheadsError: If something does not fit; which, the message says.
    """
    described, heads = description["peer"], description["heads"]
    layout = model._layout()
    for name, key in described["adapters"].items():
        old = isinstance(key, list)  # the first generation wrote a type beside it
        key = key[-1] if old else key
        config = load_config(described["config_map"].get(key, key), tolerant=True)
        version = None if old else _library(description["transformers"])
        fields = modern_config({"config": config.to_dict(), "version": version}, layout)
        names = adapter_names(name, fields, layout, old=old)
        own, _ = names.read({k: t for k, t in tensors.items() if f".{name}." in k})
        if not own:
            logger.warning("%s: adapter %r is named, but not there; it is left out.", path, name)
            continue
        adapter = model._build_adapter(name, load_config(names.config, tolerant=True))
        fill(adapter, own, f"{path}: adapter {name!r}")
        model._install(adapter)
    for name, key in described.get("fusions", {}).items():
        members = described.get("fusion_name_map", {}).get(name) or name.split(",")
        chosen = AdapterFusionConfig.load(described.get("fusion_config_map", {}).get(key, key))
        fusion = model._build_fusion(name, tuple(members), chosen)
        own, _ = FusionNames(name, {}, layout).read(tensors)
        fill(fusion, own, f"{path}: fusion {name!r}")
        model._install_fusion(fusion)
    for name, saved in heads.items() if hasattr(model, "heads") else ():
        fields = modern_head_config({"config": saved, "version": ""})
        keys = HeadNames(fields)
        found = {keys.address(k, name): t for k, t in tensors.items() if k.startswith("heads.")}
        own = {address: tensor for address, tensor in found.items() if address}
        if not own:
            logger.warning("%s: head %r is named, but not there; it is left out.", path, name)
            continue
        head = model._build_head(name, fields.pop("head_type"), fields, None, True)
        fill(head, own, f"{path}: head {name!r}")
        model._install_head(head)


def _library(transformers: str | None) -> str:
    """The library that saved a model, as far as the release of transformers beside it tells.

    The ancestor was a fork of transformers of its own, until 4.26; the library came with 4.33.
    """
    return "adapters." if transformers and Version(transformers) >= Version("4.27") else ""
