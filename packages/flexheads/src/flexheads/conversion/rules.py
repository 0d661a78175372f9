"""Applying the weight names of one rule, in either direction."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flexheads.specs import HeadRule


def rename(key: str, prefixes: Mapping[str, str]) -> str | None:
    """The key with the prefix that covers it replaced; None where none does."""
    for before, after in prefixes.items():
        if key == before or key.startswith(f"{before}."):
            return after + key[len(before) :]
    return None


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
    return {key: tensor for key, tensor in renamed.items() if key is not None}


def static_tensors(rule: HeadRule, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `flexible_tensors`, with every alias written out."""
    back = {after: before for before, after in rule.weights.items()}
    named = {rename(key, back) or key: tensor for key, tensor in tensors.items()}
    for alias, target in rule.aliases.items():
        if target in named:
            named[alias] = named[target]
    return named


def covers(rule: HeadRule, key: str) -> bool:
    """Whether a rule speaks of a static tensor."""
    return key in rule.aliases or rename(key, rule.weights) is not None
