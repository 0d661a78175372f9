"""Applying the weight names of one rule, in either direction."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig

from flexheads.configs import plain
from flexheads.errors import UnsupportedError
from flexheads.specs import HeadRule, Path


def rename(key: str, prefixes: Mapping[str, str]) -> str | None:
    """The key with the prefix that covers it replaced; None where none does."""
    for before, after in prefixes.items():
        if key == before or key.startswith(f"{before}."):
            return after + key[len(before) :]
    return None


def fixed_config(rule: HeadRule, model_config: PretrainedConfig) -> dict[str, Any]:
    """The configuration of a flexible head, as far as the static class fixes it.

    Args:
        rule: The rule.
        model_config: Configuration of the model.

    Raises:
        UnsupportedError: If the model's configuration has a value that the rule does not know.
    """
    fixed = {key: _read(model_config, path) for key, path in rule.config_from.items()}
    for key, (attribute, meanings) in rule.config_by.items():
        value = getattr(model_config, attribute, None)
        if value not in meanings:
            raise UnsupportedError(
                f"A static head with {attribute}={value!r} has no flexible equal; there is one for "
                f"{', '.join(map(repr, meanings))}."
            )
        fixed[key] = meanings[value]
    return {**fixed, **rule.config}


def _read(model_config: PretrainedConfig, path: Path) -> Any:
    names = (path,) if isinstance(path, str) else path
    values = (plain(getattr(model_config, name, None)) for name in names)
    return next((value for value in values if value is not None), None)


def flexible_tensors(rule: HeadRule, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a static head that a rule covers, under the flexible head's names.

    Args:
        rule: The rule.
        tensors: Tensors of the static head, by that class's names.
    """
    known = dict(tensors)
    for alias, target in rule.aliases.items():
        if alias in known:
            known.setdefault(target, known.pop(alias))
    renamed = {rename(key, rule.weights): tensor for key, tensor in known.items()}
    found = {key: tensor for key, tensor in renamed.items() if key is not None}
    added = known.get(rule.added_bias) if rule.added_bias is not None else None
    if added is not None and bool(added.any()):
        found["bias"] = added.reshape(-1)
    if (mixed := known.get(rule.mixed_by or "")) is not None:
        found |= {"mix.weights": mixed, "mix.scale": mixed.new_ones(())}
    for key in rule.zero_unless:
        weight = found.get(f"{key.rpartition('.')[0]}.weight")
        if weight is not None:
            found.setdefault(key, weight.new_zeros(weight.shape[0]))
    return found


def static_tensors(
    rule: HeadRule, tensors: Mapping[str, Tensor], model_config: Any, keys: Collection[str]
) -> dict[str, Tensor]:
    """The inverse of `flexible_tensors`, with every alias written out.

    Args:
        rule: The rule.
        tensors: Tensors of the flexible head.
        model_config: Configuration of the static model.
        keys: Names that the static class gives to its tensors.

    Raises:
        UnsupportedError: If a tensor that the static class lacks is not zero, or one of the two
            reads a mix of layers and the other does not.
    """
    back = {after: before for before, after in rule.weights.items()}
    back |= {after: before for before, after in rule.weights.items() if _names(before, keys)}
    own = dict(tensors)
    for key, attribute in rule.zero_unless.items():
        if not getattr(model_config, attribute) and bool(own.pop(key).any()):
            raise UnsupportedError(
                f"{key} of the head is not zero, but the static class has none with "
                f"{attribute}={getattr(model_config, attribute)!r}."
            )
    added = own.pop("bias", None) if rule.added_bias is not None else None
    mixed = _mix(rule, own, keys)
    named = {rename(key, back) or key: tensor for key, tensor in own.items()}
    if rule.added_bias is not None:
        weight = own["weight"]
        zero = weight.new_zeros(weight.shape[0])
        named[rule.added_bias] = (zero if added is None else added).reshape(1, -1)
    named |= mixed
    for alias, target in rule.aliases.items():
        if target in named:
            named[alias] = named[target]
    return named


def renamed(
    rule: HeadRule, tensors: Mapping[str, Tensor], keys: Collection[str]
) -> dict[str, Tensor]:
    """Tensors of a static head, under the names that another release of its class has for them.

    Args:
        rule: The rule.
        tensors: Tensors of the static head.
        keys: Names that the class gives to its tensors now.
    """
    back = {after: before for before, after in rule.weights.items() if _names(before, keys)}

    def name(key: str) -> str:
        meaning = None if key in keys else rename(key, rule.weights)
        return key if meaning is None else rename(meaning, back) or key

    return {name(key): tensor for key, tensor in tensors.items()}


def _mix(rule: HeadRule, own: dict[str, Tensor], keys: Collection[str]) -> dict[str, Tensor]:
    """Takes the weights of the layers out of a flexible head, under the static class's name."""
    weights, scale = own.pop("mix.weights", None), own.pop("mix.scale", None)
    if (weights is None) != (rule.mixed_by not in keys):
        mix, last = "a mix of layers", "the last layer"
        head, static = (last, mix) if weights is None else (mix, last)
        raise UnsupportedError(f"The head reads {head}, and the static class {static}.")
    if weights is None or scale is None:
        return {}
    if float(scale) != 1:
        raise UnsupportedError(
            f"The head scales its mix of layers by {float(scale):g}; the static class does not."
        )
    return {str(rule.mixed_by): weights}


def _names(prefix: str, keys: Collection[str]) -> bool:
    """Whether a prefix covers one of some tensors."""
    return any(rename(key, {prefix: ""}) is not None for key in keys)


def covers(rule: HeadRule, key: str) -> bool:
    """Whether a rule speaks of a static tensor."""
    known = key in rule.aliases or key in (rule.added_bias, rule.mixed_by)
    return known or rename(key, rule.weights) is not None
