"""Our model and the peer's with the same weights: in the backbone, in an adapter, in a head."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from flexheads import BertModelWithHeads, init, load_config
from flexheads.checkpoints.hub.heads import HeadNames
from flexheads.checkpoints.hub.methods import adapter_names
from flexheads.testing import randomise, tiny_config, tiny_inputs

from .library import BertAdapterModel, PeerConfig, adapters

NAME = "an_adapter"
SEED = 3

# --- models and inputs ------------------------------------------------------------------------


def config(**changes: Any) -> Any:
    """A tiny BERT without dropout; each model gets its own, because the libraries write into it."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tiny_config("bert", attn_implementation="eager", **no_dropout, **changes)


@functools.cache
def backbone_state() -> dict[str, Tensor]:
    torch.manual_seed(SEED)
    return randomise(transformers.BertModel(config()), std=0.2).state_dict()


def our_model(kind: type[Any] = BertModelWithHeads, **changes: Any) -> Any:
    return with_backbone(init(kind(config(**changes))))


def peer_model(kind: type[Any] = BertAdapterModel, **changes: Any) -> Any:
    model = kind(config(**changes))
    adapters.init(model)
    return with_backbone(model)


def with_backbone(model: Any) -> Any:
    """The model with the weights that all models here share, in eval mode."""
    given = backbone_state()
    own = [key for key, _ in model.base_model.named_parameters() if key in given]
    assert len(own) > 30
    model.base_model.load_state_dict({key: given[key] for key in own}, strict=False)
    return model.eval()


def inputs() -> dict[str, Tensor]:
    return tiny_inputs(config())


# --- the same weights in both -----------------------------------------------------------------


def peer_keys(model: Any, name: str) -> dict[str, list[str]]:
    """For each parameter of an adapter of ours, by logical address, its names in the peer."""
    names = file_names(model, name)
    return {address: names.keys(address) for address in model.adapters[name].state_dict()}


def file_names(model: Any, name: str) -> Any:
    """What translates the tensors of an adapter of ours into the peer's."""
    return adapter_names(name, model.adapters[name].config.to_dict(), model._layout())


def adapter_keys(ours: Any, name: str = NAME) -> dict[str, list[str]]:
    prefix = f"adapters.{ours.adapters.key(name)}."
    return {f"{prefix}{address}": keys for address, keys in peer_keys(ours, name).items()}


def copy_adapter(ours: Any, theirs: Any, name: str = NAME) -> None:
    """Gives the peer's adapter our weights; it must have exactly the parameters that ours has."""
    named = file_names(ours, name).write(ours.adapters[name].state_dict())
    own = {key for key in theirs.state_dict() if f".{name}." in key}
    # One module for the prefixes of all layers is named once for each layer too.
    assert {key for key in own if ".prefix_tuning.pool." not in key} == set(named)
    assert not theirs.load_state_dict(named, strict=False).unexpected_keys


def copy_head(ours: Any, theirs: Any, name: str) -> dict[str, str]:
    """Gives the peer's head our weights; returns the peer's name of each of our parameters."""
    head = ours.heads[name]
    names = HeadNames(head.to_dict())
    keys = {address: names.key(address, name) for address in head.state_dict()}
    named = {keys[address]: tensor for address, tensor in head.state_dict().items()}
    assert not theirs.load_state_dict(named, strict=False).unexpected_keys
    return keys


def adapted(fields: Any, theirs: Any = None, ours: Any = None, **changes: Any) -> tuple[Any, Any]:
    """Our model and the peer's with one active adapter of the same weights, in double precision."""
    ours = our_model() if ours is None else ours
    theirs = peer_model() if theirs is None else theirs
    ours.add_adapter(NAME, load_config(fields, **changes), set_active=True)
    theirs.add_adapter(NAME, config=PeerConfig.load(fields, **changes), set_active=True)
    randomise(ours.adapters[NAME], seed=SEED)
    copy_adapter(ours, theirs)
    return ours.double(), theirs.double()


# --- new weights in one -----------------------------------------------------------------------


def add_our_adapter(ours: Any, fields: Any, name: str = NAME) -> None:
    """Adds an active adapter to a model of ours, every tensor of it random."""
    ours.add_adapter(name, fields, set_active=True)
    randomise(ours.adapters[name], seed=SEED)


def add_peer_adapter(theirs: Any, fields: Mapping[str, Any], name: str = NAME) -> None:
    """Adds an active adapter to a model of the peer's, every tensor of it random."""
    theirs.add_adapter(name, config=PeerConfig.load(dict(fields)), set_active=True)
    randomise_named(theirs, f".{name}.")


@torch.no_grad()
def randomise_named(model: Any, word: str) -> None:
    generator = torch.Generator().manual_seed(SEED)
    for key, parameter in model.named_parameters():
        if word in key:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            if key.endswith(".parametrizations.weight.original"):  # its diagonal holds signs
                parameter.diagonal().copy_(parameter.diagonal().sign())
