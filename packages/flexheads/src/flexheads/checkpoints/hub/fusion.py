"""AdapterFusion in AdapterHub files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexheads.checkpoints.bundle import Bundle, Layout, SavedFusion
from flexheads.checkpoints.hub.envelope import envelope, require_weights, required_field
from flexheads.checkpoints.hub.names import AdapterNames
from flexheads.checkpoints.store import read_tensors, write_json, write_tensors
from flexheads.errors import CheckpointError

FUSION_CONFIG = "adapter_fusion_config.json"
FUSION_WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")


class FusionNames(AdapterNames):
    """The parts' own names are those of the files."""

    infix = "adapter_fusion_layer"


def read_fusion(directory: Path, content: Mapping[str, Any], layout: Layout) -> SavedFusion:
    """The AdapterFusion in a directory.

    Args:
        directory: The directory.
        content: Its configuration file.
        layout: The model that it is read for.

    Raises:
        CheckpointError: If the files are damaged or do not fit the model.
    """
    path = require_weights(directory, FUSION_WEIGHTS)
    name = str(required_field(content, "name", directory))
    config = required_field(content, "config", directory)
    # Every release picks tensors by the beginning of the name, so others may be there too.
    stem = f".{FusionNames.infix}.{name}"
    raw = {
        key: tensor
        for key, tensor in read_tensors(path).items()
        if stem not in key or f"{stem}." in key
    }
    names = FusionNames(name, config, layout, old=content.get("version") is None)
    tensors, unexpected = names.read(raw)
    if unexpected:
        raise CheckpointError(
            f"{path}: {len(unexpected)} tensors have no place in fusion {name!r} of a "
            f"{layout.architecture} model: {', '.join(sorted(unexpected)[:5])}."
        )
    members = tuple(content.get("adapter_names") or name.split(","))
    return SavedFusion(name=name, members=members, config=config, tensors=tensors)


def write_fusion(bundle: Bundle, fusion: SavedFusion, directory: Path, layout: Layout) -> None:
    """Writes an AdapterFusion into a directory."""
    content = envelope(bundle.fusion_from, fusion.name, fusion.config)
    content["adapter_names"] = list(fusion.members)
    names = FusionNames(fusion.name, fusion.config, layout)
    write_json(directory / FUSION_CONFIG, content)
    write_tensors(directory / FUSION_WEIGHTS[0], names.write(fusion.tensors))
