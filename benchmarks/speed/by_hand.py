"""The works by hand: what the arithmetic costs at least, in plain torch.

Each function takes a backbone of its own and the flexheads model whose adapters it repeats, and
puts the same weights into the backbone. What it gives is compared with what flexheads gives before
anything is timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from benchmarks.speed.by_hand_parts import (
    Around,
    Attending,
    Bottleneck,
    InSequence,
    LowRank,
    LowRankByRow,
    PrefixedAttention,
    Scaled,
    SideBySide,
    change_stream,
    layers_of,
    replace,
)
from torch import Tensor
from torch.nn import functional


def _at(module: Any, layer: int, role: str) -> dict[str, Tensor]:
    """The weights of an adapter, or a fusion, at one place; empty where it has none."""
    start = f"layers.{layer}.{role}."
    state = module.state_dict()
    return {key[len(start) :]: value for key, value in state.items() if key.startswith(start)}


def _bottlenecks(model: Any, layer: int, names: Sequence[str]) -> list[Bottleneck]:
    found = (_at(model.adapters[name], layer, "feed_forward") for name in names)
    return [Bottleneck(weights) for weights in found if weights]


def stack(backbone: Any, model: Any, *names: str) -> None:
    """Bottlenecks of `seq_bn`, one behind the other."""
    for index, layer in enumerate(layers_of(backbone)):
        if bottlenecks := _bottlenecks(model, index, names):
            change_stream(layer, InSequence(bottlenecks))


def parallel(backbone: Any, model: Any, *names: str) -> None:
    """Bottlenecks of `seq_bn`, each for its share of a batch that is repeated."""
    for index, layer in enumerate(layers_of(backbone)):
        change_stream(layer, SideBySide(_bottlenecks(model, index, names)))


def fuse(backbone: Any, model: Any, *names: str) -> None:
    """Bottlenecks of `seq_bn` under AdapterFusion."""
    fusion = model.adapter_fusions[",".join(names)]
    for index, layer in enumerate(layers_of(backbone)):
        weights = _at(fusion, index, "feed_forward")
        change_stream(layer, Attending(_bottlenecks(model, index, names), weights))


def double_seq_bn(backbone: Any, model: Any, name: str) -> None:
    """Bottlenecks behind the attention and behind the feed-forward part."""
    for index, layer in enumerate(layers_of(backbone)):
        for role in ("attention", "feed_forward"):
            weights = _at(model.adapters[name], index, role)
            bottleneck = Bottleneck(weights, functional.silu)
            replace(layer, role, partial(Around, bottleneck=bottleneck))


def lora(backbone: Any, model: Any, name: str) -> None:
    """LoRA on query and value, not folded into them."""
    for index, layer in enumerate(layers_of(backbone)):
        for role in ("query", "value"):
            down, up = _at(model.adapters[name], index, role).values()
            replace(layer, role, partial(LowRank, down=down, up=up))


def rows(backbone: Any, model: Any, names: Sequence[str]) -> None:
    """A LoRA for each row: a bank of all, the rows' own picked out, two batched products."""
    known = list(dict.fromkeys(names))
    device = next(backbone.parameters()).device
    index = torch.tensor([known.index(name) for name in names], device=device)
    for number, layer in enumerate(layers_of(backbone)):
        for role in ("query", "value"):
            factors = [_at(model.adapters[name], number, role).values() for name in known]
            downs, ups = map(torch.stack, zip(*factors, strict=True))
            replace(layer, role, partial(LowRankByRow, downs=downs, ups=ups, rows=index))


def ia3(backbone: Any, model: Any, name: str) -> None:
    """IA3 on key, value and what enters the feed-forward part, not folded into them."""
    for index, layer in enumerate(layers_of(backbone)):
        for role in ("key", "value", "mlp_in"):
            (scale,) = _at(model.adapters[name], index, role).values()
            replace(layer, role, partial(Scaled, scale=scale.flatten()))


def prefix_tuning(backbone: Any, model: Any, name: str) -> None:
    """Keys and values in front of every attention, made by the network once."""
    pool = model.adapters[name].get_submodule("shared.self_prefix")
    for index, layer in enumerate(layers_of(backbone)):
        keys, values = pool.states(index).detach()
        attention = layer.attention
        attention.self = PrefixedAttention(attention.self, keys, values)
