"""From flexible heads back to the head of a transformers class."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor
from transformers import PretrainedConfig

from flexheads.checkpoints.bundle import SavedHead, SavedStaticHead
from flexheads.conversion.rules import fixed_config, renamed, static_tensors
from flexheads.errors import UnsupportedError
from flexheads.plugins import registry, resolve
from flexheads.specs import HeadConversion, HeadRule

_WITHOUT = {"pooling", "late", "hidden_layer", "side", "layer_norm"}
"""Fields for which static classes have the default unless their rule says otherwise."""


def convert_to_static(
    heads: Sequence[SavedHead],
    conversion: HeadConversion,
    model_config: PretrainedConfig,
    embeddings: Tensor | None,
    keys: Collection[str],
) -> SavedStaticHead:
    """The static head that equals flexible heads; the inverse of `convert_to_flexible`.

    Args:
        heads: One head for each rule of the conversion, in that order.
        conversion: The rules of the static class.
        model_config: Configuration of the static model.
        embeddings: Its input embeddings, for a tied output matrix.
        keys: The names of its head's tensors.

    Raises:
        UnsupportedError: If a head has another shape than the class; the message says what differs.
    """
    if len(heads) != len(conversion.heads):
        raise UnsupportedError(
            f"{conversion.static_class} has {len(conversion.heads)} heads, not {len(heads)}."
        )
    tensors: dict[str, Tensor] = {}
    labels: Mapping[str, int] | None = None
    problem_type: str | None = None
    for head, rule in zip(heads, conversion.heads, strict=True):
        _check(head, rule, conversion.static_class, model_config)
        own = dict(head.tensors)
        if head.config.get("tied") and embeddings is not None:
            own["weight"] = embeddings
        tensors |= static_tensors(rule, own, model_config, keys)
        labels = labels or head.config.get("label2id")
        problem_type = problem_type or head.config.get("problem_type")
        if rule.head_type != head.config["head_type"]:
            problem_type = "multi_label_classification"
    return SavedStaticHead(
        model_class=conversion.static_class,
        tensors=tensors,
        label2id=labels,
        problem_type=problem_type,
    )


def in_names_of(head: SavedStaticHead, keys: Collection[str]) -> SavedStaticHead:
    """A static head as the installed release of its class names the tensors.

    Args:
        head: The head, maybe saved with another release.
        keys: The names of the tensors now.
    """
    conversion = registry().conversions.get(head.model_class)
    tensors = dict(head.tensors)
    for rule in conversion.heads if conversion is not None else ():
        tensors = renamed(rule, tensors, keys)
    return dataclasses.replace(head, tensors=tensors)


def _check(
    head: SavedHead, rule: HeadRule, static_class: str, model_config: PretrainedConfig
) -> None:
    kind = head.config["head_type"]
    same = kind == rule.head_type or (kind, rule.head_type) == (
        "multilabel_classification",
        "classification",
    )
    if not same:
        raise UnsupportedError(
            f"{static_class} holds a {rule.head_type} head; {head.name!r} is of type {kind}."
        )
    head_class = resolve(registry().head_type(kind).head)
    given = {key: value for key, value in head.config.items() if key != "head_type"}
    config = head_class.config_class.from_dict(given, tolerant=True)
    wanted = fixed_config(rule, model_config)
    wanted.pop("dropout_prob", None)  # the class has its own
    for name in _WITHOUT & set(config):
        wanted.setdefault(name, head_class.config_class._default(name))
    if rule.mixed_by is not None and config.get("hidden_layer") == "mix":
        wanted["hidden_layer"] = "mix"  # whether the class does, its tensors say
    # An activation or a pooler between layers that do not exist changes nothing.
    skip = {"activation_function"} if config.get("layers") == wanted.get("layers") == 1 else set()
    differing = [
        f"{key}={config[key]!r} (the class has {value!r})"
        for key, value in wanted.items()
        if key not in skip and config.get(key) != value
    ]
    if differing:
        raise UnsupportedError(
            f"Head {head.name!r} cannot become a {static_class}: {'; '.join(differing)}."
        )
