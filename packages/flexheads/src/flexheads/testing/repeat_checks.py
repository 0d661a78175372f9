"""The checks of where rows are repeated for `Parallel`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flexheads.composition import Parallel, Stack
from flexheads.methods.config import load_config
from flexheads.models.with_heads import ModelWithHeads
from flexheads.testing.fitting import other_config
from flexheads.testing.static_checks import same
from flexheads.testing.tiny import randomise, tiny_inputs, tiny_model

LENGTH = 7
BRANCHES = (Stack("common", "one"), Stack("common", "two"), "common")
"""Setups that differ from a layer on."""


def check_shared_layers(architecture: str) -> None:
    """Branches that are alike in the first layers are what each is alone.

    Where the spec says that they can, they share these layers. Everything that the backbone gives
    is compared, for batches as large as other dimensions are: one row, as many as tiny models have
    heads, and as many as there are positions.
    """
    model = model_with_upper_adapters(architecture)
    depth, decoder = model._attachment.depth, model._attachment.repeater.start
    assert depth > 1 or not model.spec.shares_layers, "There is nothing to share."
    for start in range(1, depth):
        model = model_with_upper_adapters(architecture, start)
        shares = model.spec.shares_layers and start >= decoder
        repeat_at = model._call_plan(Parallel(*BRANCHES)).repeat_at
        assert repeat_at == (start if shares else None), (
            f"Rows are repeated at {repeat_at}, though the spec says "
            f"shares_layers={model.spec.shares_layers}."
        )
        for batch in (1, 3, 4, LENGTH) if shares and start == depth - 1 else [3]:
            compare_branches(model, batch)


def model_with_upper_adapters(architecture: str, start: int = 1, **changes: Any) -> ModelWithHeads:
    """A tiny model with an adapter in all layers, and two in those from `start` on."""
    model = tiny_model(architecture, attn_implementation="eager", **changes)
    model.add_adapter("common", config="double_seq_bn")
    for name, config in (("one", "double_seq_bn"), ("two", other_config(model))):
        model.add_adapter(name, config=load_config(config, leave_out=list(range(start))))
    for seed, adapter in enumerate(model.adapters.values()):
        randomise(adapter, seed=seed)
    return model


@torch.no_grad()
def compare_branches(model: Any, batch: int, **call: Any) -> None:
    """Compares all outputs under a `Parallel` with those of its branches, one after the other."""
    inputs = tiny_inputs(model.config, batch, LENGTH)
    call = {"output_hidden_states": True, "output_attentions": True, **call}
    found = dict(tensors(model(**inputs, adapter_names=Parallel(*BRANCHES), **call)))
    alone = [dict(tensors(model(**inputs, adapter_names=one, **call))) for one in BRANCHES]
    assert found.keys() == alone[0].keys(), "Other outputs than without Parallel."
    for name, tensor in found.items():
        if name.startswith(".logits_per_"):
            continue  # of two parts, each row of one with all of the other
        expected = [own[name] for own in alone]
        whole = torch.cat(expected) if tensor.shape != expected[0].shape else expected[0]
        scale = whole.abs().max().clamp(min=1.0)
        same(tensor / scale, whole / scale, f"{name} of {batch} rows under Parallel")


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in an output, caches included, each with its place."""
    if isinstance(value, Tensor):
        yield name, value
    elif hasattr(value, "items"):
        for key, inner in value.items():
            yield from tensors(inner, f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for number, inner in enumerate(value):
            yield from tensors(inner, f"{name}[{number}]")
    else:
        for side in ("self_attention_cache", "cross_attention_cache"):
            if hasattr(value, side):
                yield from tensors(getattr(value, side), f"{name}.{side}")
        for number, layer in enumerate(getattr(value, "layers", ())):
            yield from tensors({"keys": layer.keys, "values": layer.values}, f"{name}[{number}]")
