"""The sites of one model: those of its architecture that it has, or those of its two parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from flexheads.plugins import registry
from flexheads.sites.finding import alternatives, find_module, first
from flexheads.specs import ArchitectureSpec, LayerSpec, Path, Side

SIDES: tuple[Side, ...] = ("encoder", "decoder")


def fitted(spec: ArchitectureSpec, backbone: Any) -> ArchitectureSpec:
    """The spec with the layers that a model has.

    Args:
        spec: The architecture of the model.
        backbone: The model; where the architecture is composed it holds one of each side.

    Raises:
        UnsupportedError: If the spec is not about such a model.
        UnknownNameError: If no installed package knows the architecture of one side.
    """
    spec.check(backbone.config)
    if not spec.composed:
        return spec.fitting(backbone.config)
    layers: list[LayerSpec] = []
    norms: list[Path] = []
    changes: dict[str, Any] = {}
    for side in SIDES:
        own, prefix = _side(backbone, side)
        stacks = [stack for stack in own.layers if stack.side in (None, side)]
        layers += [
            replace(stack, path=_below(prefix, stack.path), side=side, config=side)
            for stack in stacks
        ]
        norms += [_below(prefix, path) for path in own.norms]
        if side == "encoder" and own.embeddings is not None:
            changes = {
                "embeddings": _below(prefix, own.embeddings),
                "embeddings_from": own.embeddings_from,
                "adapterhub": {"embeddings": prefix},
            }
            if own.late_embeddings is not None:
                changes["late_embeddings"] = _below(prefix, own.late_embeddings)
    return replace(spec, layers=tuple(layers), norms=tuple(norms), **changes)


def layer_width(layer: nn.Module, layers: LayerSpec, config: Any, owner: str) -> int:
    """The size of the hidden states in a layer.

    In a list of lists of layers each list may have its own, which the norms tell.
    """
    if ".*." not in first(layers.path) or not layers.norms:
        return int(config.hidden_size)
    norm: Any = find_module(layer, layers.norms[0], owner)
    return int(norm.weight.shape[0])


def _side(backbone: Any, side: Side) -> tuple[ArchitectureSpec, str]:
    """The architecture of one side, and where its base model hangs."""
    part = getattr(backbone, side)
    inner = part.base_model
    own = fitted(registry().architecture_for(inner.config.model_type), inner)
    names = [name for name, module in part.named_modules() if module is inner]
    return own, ".".join(filter(None, (side, names[0])))


def _below(prefix: str, path: Path) -> Path:
    return tuple(f"{prefix}.{one}" for one in alternatives(path))
