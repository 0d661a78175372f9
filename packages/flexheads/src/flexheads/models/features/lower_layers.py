"""A backbone without its lower layers: what they would have given was computed before."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.models.features.given import FEATURES
from flexheads.plan import Plan
from flexheads.sites.base import first_argument, input_embeddings

AFTER = "after_layer_"
"""How the name of features begins that are hidden states after so many layers."""


def states_given(features: Mapping[str, Any]) -> tuple[int, Tensor] | None:
    """After how many layers hidden states are given, and those states; None for other features."""
    for name, value in features.items():
        if name.startswith(AFTER):
            return int(name.removeprefix(AFTER)), value
    return None


def check_layers(model: Any, count: int) -> None:
    """Refuses a number of lower layers that a model cannot do without.

    Raises:
        ConfigError: If it does not leave a layer on either side.
        UnsupportedError: If the model's layers hand on more than hidden states.
    """
    layers = _layers(model)
    if not layers or len(layers) != len(_holding(model._attachment.backbone, layers[0])):
        raise UnsupportedError(
            f"{type(model).__name__} cannot begin at a layer in the middle: its layers hand on "
            "more than hidden states. Leave out lower_layers."
        )
    if not 0 < count < len(layers):
        raise ConfigError(
            f"lower_layers={count!r} should be from 1 to {len(layers) - 1}, as the model has "
            f"{len(layers)} layers."
        )


def check_frozen(model: Any, plan: Plan, count: int) -> None:
    """Refuses what would change the states after the lowest `count` layers.

    Raises:
        UnsupportedError: If an adapter acts there, or rows are repeated, or weights are trainable.
    """
    sites = model._attachment.sites
    below = [a for a in plan.ops if sites[a].layer is None or sites[a].layer < count]
    if below or plan.routing.repeat > 1:
        what = f"acts at {below[0]}" if below else "repeats the rows of the batch"
        raise UnsupportedError(
            f"{plan.setup!r} {what}, so the lowest {count} layers cannot be left out. Give its "
            f"adapters leave_out={list(range(count))}, or make a cache for fewer layers."
        )
    lower = (_embeddings(model), *_layers(model)[:count])
    if any(parameter.requires_grad for module in lower for parameter in module.parameters()):
        raise UnsupportedError(
            f"The embeddings or the lowest {count} layers are trainable, and stored features would "
            "keep them as they are. Freeze them with requires_grad_(False), or call freeze_model()."
        )


def _layers(model: Any) -> list[nn.Module]:
    """The layers in the order in which they run; none where they hand on more than states."""
    return [entry.layer for entry in model._attachment.repeater.entries]


def _embeddings(model: Any) -> nn.Module:
    found = input_embeddings(model._attachment.backbone)
    return found if isinstance(found, nn.Module) else nn.Module()


def lower_tensors(model: Any, count: int) -> Iterable[tuple[str, Tensor]]:
    """The tensors that states after the lowest `count` layers can depend on, by name.

    What is above, or trained, is left out: it may change, and the states do not.
    """
    backbone = model._attachment.backbone
    above = {id(t) for layer in _layers(model)[count:] for t in _tensors(layer)}
    trained = {id(p) for p in backbone.parameters() if p.requires_grad}
    for name, tensor in backbone.state_dict(keep_vars=True).items():
        if id(tensor) not in above and id(tensor) not in trained:
            yield name, tensor


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@torch.no_grad()
def run_lower(model: Any, inputs: Mapping[str, Any], count: int) -> Tensor:
    """The hidden states after the lowest `count` layers, ``(batch, sequence, hidden)``."""
    *lower, last = _layers(model)[: count + 1]
    try:
        _with_layers(model, [*lower, _Catching(last)])(**inputs, return_dict=True)
    except _Caught as caught:
        return caught.hidden
    raise UnsupportedError(f"{type(model).__name__} has not run its layer {count}.")


@torch.no_grad()
def check_alike(model: Any, plan: Plan, inputs: Mapping[str, Any], count: int) -> None:
    """Refuses an architecture in which the upper layers do more than what is left of the model.

    Args:
        model: The model, in evaluation mode.
        plan: The plan, which is in force.
        inputs: The backbone's inputs to try.
        count: How many layers to leave out.

    Raises:
        UnsupportedError: If the backbone as a whole gives something else.
    """
    whole = model._attachment.backbone(**inputs, return_dict=True).last_hidden_state
    upper = upper_backbone(model, plan, count, run_lower(model, inputs, count))
    try:
        torch.testing.assert_close(upper(**inputs, return_dict=True).last_hidden_state, whole)
    except AssertionError as error:
        raise UnsupportedError(
            f"{type(model).__name__} gives something else when it begins after {count} layers, as "
            f"some do more around a layer than to run it. Leave out lower_layers. ({error})"
        ) from error


def upper_backbone(model: Any, plan: Plan, count: int, states: Tensor) -> Any:
    """The backbone for one call, which begins with the states after its lowest `count` layers.

    It is a copy of the modules that hold the layers; those, and all weights and hooks, are the
    model's own. So other calls that run at the same time are as ever.

    Args:
        model: The model.
        plan: The plan of the call.
        count: How many layers are left out.
        states: What they would have given, ``(batch, sequence, hidden)``.

    Raises:
        UnsupportedError: If a head reads a single layer, or a call wants what layers give; if the
            states do not hold under the plan; under ``torch.compile``.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedError("Stored states of lower layers do not go through torch.compile.")
    check_layers(model, count)
    check_frozen(model, plan, count)
    for route in plan.heads:
        if model.heads[route.head].config.hidden_layer is not None:
            raise UnsupportedError(
                f"Head {route.head!r} reads single layers, and the lower ones do not run."
            )
    first, *rest = _layers(model)[count:]
    return _with_layers(model, [_Entered(first, states), *rest])


def without_features(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The backbone's inputs for a call that begins above: without features, and without a cache.

    Raises:
        UnsupportedError: If the call wants what the layers give one by one.
    """
    for name in ("output_hidden_states", "output_attentions"):
        if inputs.get(name):
            raise UnsupportedError(f"{name} has no answer where the lower layers do not run.")
    return {name: value for name, value in inputs.items() if name != FEATURES}


def _with_layers(model: Any, layers: list[nn.Module]) -> Any:
    """A copy of the backbone, down to the list of its layers, with other layers."""
    backbone = model._attachment.backbone
    stack = _holding(backbone, _layers(model)[0])
    path = next(name for name, module in backbone.named_modules() if module is stack)
    config = _config_of(backbone.config, len(stack), len(layers))
    copied = view = _shallow(backbone, config)
    *owners, last = path.split(".")
    for name in owners:
        view._modules[name] = view = _shallow(view._modules[name], config)
    view._modules[last] = nn.ModuleList(layers)
    return copied


def _holding(backbone: nn.Module, layer: nn.Module) -> Any:
    """The list that holds a layer."""
    return next(m for m in backbone.modules() if any(c is layer for c in m.children()))


def _shallow(module: Any, config: Any) -> Any:
    """A copy of a module with the same parts, weights and hooks, and children of its own list."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    if hasattr(module, "config"):
        copied.config = config
    return copied


def _config_of(config: Any, before: int, now: int) -> Any:
    """A copy of a configuration, for as many of the highest layers."""
    copied = copy.copy(config)
    copied.use_cache = False  # layers would look for a place of their number in it
    name = getattr(type(config), "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    vars(copied)[name] = now
    for name, value in vars(config).items():
        if name.startswith("layer_") and isinstance(value, list) and len(value) == before:
            vars(copied)[name] = value[-now:]
    return copied


class _Around(nn.Module):
    """Stands before a layer in the list, and has what the model asks of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class _Entered(_Around):
    """A layer whose hidden states are given."""

    def __init__(self, layer: nn.Module, states: Tensor) -> None:
        super().__init__(layer)
        self.states = states

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer on them."""
        if self.states.shape != (was := first_argument(args, kwargs)).shape:
            raise ConfigError(
                f"The stored states have the shape {tuple(self.states.shape)}, but the inputs of "
                f"this call {tuple(was.shape)}. Make batches with the cache's collator."
            )
        states = self.states.to(was.device, was.dtype)
        if args:
            return self.layer(states, *args[1:], **kwargs)
        return self.layer(**{**kwargs, "hidden_states": states})


class _Caught(Exception):
    """Carries the hidden states out of a backbone that shall run no further."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Catching(_Around):
    """Ends the pass before a layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises what the layer would have been given."""
        raise _Caught(first_argument(args, kwargs))
