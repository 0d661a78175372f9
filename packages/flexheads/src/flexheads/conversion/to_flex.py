"""From the head of a transformers class to flexible heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from flexheads.checkpoints.bundle import SavedHead, SavedStaticHead
from flexheads.conversion.rules import covers, fixed_config, flexible_tensors
from flexheads.errors import CheckpointError
from flexheads.heads.custom import class_of
from flexheads.specs import HeadConversion, HeadRule

_OWN_LABELS = ("next_sentence",)
"""Head types whose outputs never are the labels that the static model's configuration names."""


def convert_to_flexible(
    head: SavedStaticHead,
    conversion: HeadConversion,
    name: str,
    model_config: PretrainedConfig,
    embeddings: Tensor | None,
) -> list[SavedHead]:
    """The flexible heads that equal a static head.

    Args:
        head: The static head.
        conversion: The rules of its class.
        name: Name for the flexible head; further heads of one class append their suffix.
        model_config: Configuration of the model that they go into.
        embeddings: That model's input embeddings. An output matrix that equals them is tied.

    Raises:
        CheckpointError: If a tensor is missing, or the rules do not cover one.
    """
    if left := [key for key in head.tensors if not any(covers(r, key) for r in conversion.heads)]:
        raise CheckpointError(
            f"The head of {head.model_class} has tensors that its conversion does not cover: "
            f"{', '.join(sorted(left))}."
        )
    return [
        _convert(head, rule, name + rule.suffix, model_config, embeddings)
        for rule in conversion.heads
    ]


def _convert(
    head: SavedStaticHead,
    rule: HeadRule,
    name: str,
    model_config: PretrainedConfig,
    embeddings: Tensor | None,
) -> SavedHead:
    tensors = flexible_tensors(rule, head.tensors)
    head_class = class_of(rule.head_type)
    config = {"head_type": rule.head_type, **fixed_config(rule, model_config)}
    if rule.added_bias is not None:
        config["bias"] = "bias" in tensors
    if "mix.weights" in tensors:
        config["hidden_layer"] = "mix"
    if "num_labels" in head_class.config_class._names():
        count = head_class.labels_in(config, tensors)
        if count is None:
            raise CheckpointError(f"The head of {head.model_class} has no weights for {name!r}.")
        named = None if rule.head_type in _OWN_LABELS else head.label2id
        config |= _labels(head, named, count)
    if head.problem_type is not None and "problem_type" in head_class.config_class._names():
        config["problem_type"] = head.problem_type
    config, tensors = untie(config, tensors, embeddings)
    return SavedHead(name=name, config=config, tensors=tensors)


def untie(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    embeddings: Tensor | None,
    provider: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Drops the output matrix of a language-model head where it is the model's own embeddings.

    Args:
        config: The head's configuration.
        tensors: Its tensors.
        embeddings: The model's input embeddings.
        provider: Who wrote the file, for the message where the type is not installed.

    Returns:
        The configuration with ``tied`` decided, and the tensors that remain the head's.
    """
    config, tensors = dict(config), dict(tensors)
    head_class = class_of(config["head_type"], provider)
    can_tie = "tied" in head_class.config_class._names()
    if can_tie and config.get("tied") is None:
        weight = tensors.get("weight")
        tied = weight is None or (
            embeddings is not None
            and weight.shape == embeddings.shape
            and torch.equal(weight, embeddings.to(weight))
        )
        config["tied"] = tied
    if config.get("tied"):
        tensors.pop("weight", None)
    return config, tensors


def _labels(head: SavedStaticHead, labels: Mapping[str, int] | None, count: int) -> dict[str, Any]:
    if labels is None:
        labels = {f"LABEL_{number}": number for number in range(count)}
    elif len(labels) != count:
        raise CheckpointError(
            f"The head of {head.model_class} has {count} outputs, but its file names "
            f"{len(labels)} labels. Pass id2label= with {count} names."
        )
    return {"num_labels": count, "label2id": dict(labels)}
