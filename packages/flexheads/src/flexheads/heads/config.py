"""Configurations that heads have in common: depth, pooling, which layer is read, labels, loss."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from flexheads.configs import Config
from flexheads.errors import ConfigError, LabelError

POOLINGS = (
    "first_token",
    "last_token",
    "eos",
    "mean",
    "max",
    "attention",
    "pooler",
    "patch_mean",
    "first_token_and_patch_mean",
)
"""What can stand for a sequence; see `flexheads.heads.pooling.pool`."""

_WHOLE_NUMBERS = ("num_labels", "num_choices", "layers")
_YES_OR_NO = ("use_pooler", "bias", "layer_norm")
_SHARES = ("dropout_prob", "threshold")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class HeadConfig(Config):
    """Base configuration of heads.

    Attributes:
        dropout_prob: Dropout inside the head; None takes the model's own value.
        hidden_layer: Which hidden states the head reads, counted as transformers'
            ``hidden_states``: 0 are the embeddings, -1 is the last layer. ``"mix"`` learns a
            weighted sum of all. None reads what the model returns as its last.
        side: ``"encoder"`` for a head that reads the encoder of a model that has a decoder too.
            Where all heads of a call do, the decoder does not run.
        loss: The loss, by its name or as ``{"type": name, ...}`` with its parameters; see
            `flexheads.heads.losses`. None is the type's own.
    """

    dropout_prob: float | None = None
    hidden_layer: int | str | None = None
    side: str | None = None
    loss: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in _WHOLE_NUMBERS:
            value = self.get(name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r} should be a whole number, at least 1.")
        for name in _YES_OR_NO:
            if not isinstance(value := self.get(name, False), bool):
                raise ConfigError(f"{name}={value!r} should be True or False.")
        for name in _SHARES:
            value = self.get(name)
            if value is not None and (type(value) not in (int, float) or not 0 <= value <= 1):
                raise ConfigError(f"{name}={value!r} should be a number from 0 to 1.")
        function = self.get("activation_function")
        if not isinstance(function, str | None):
            raise ConfigError(f"activation_function={function!r} should be a name, or None.")
        layer = self.hidden_layer
        if layer is not None and layer != "mix" and type(layer) is not int:
            raise ConfigError(f'hidden_layer={layer!r} should be a whole number, "mix", or None.')
        if self.side not in (None, "encoder"):
            raise ConfigError(f'side={self.side!r} should be "encoder" or None.')


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FeedForwardConfig(HeadConfig):
    """Configuration of heads that are linear layers.

    Attributes:
        layers: Number of linear layers.
        activation_function: Activation between them, or None.
        layer_norm: Whether a layer norm follows each of those activations.
        bias: Whether the last layer has a bias.
    """

    layers: int = 1
    activation_function: str | None = "tanh"
    layer_norm: bool = False
    bias: bool = True


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PooledConfig(FeedForwardConfig):
    """Configuration of heads that read one vector for the sequence.

    Attributes:
        pooling: What stands for the sequence, one of `POOLINGS`; None is the architecture's own.
        use_pooler: The same as ``pooling="pooler"``: read the model's trained pooler.
    """

    pooling: str | None = None
    use_pooler: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pooling not in (None, *POOLINGS):
            raise ConfigError(
                f"pooling={self.pooling!r} is unknown; it can be {', '.join(POOLINGS)}."
            )
        if self.use_pooler and self.pooling not in (None, "pooler"):
            raise ConfigError(f"use_pooler=True contradicts pooling={self.pooling!r}.")

    @property
    def pooled_by(self) -> str | None:
        """What stands for the sequence; None is the architecture's own."""
        return "pooler" if self.use_pooler else self.pooling


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class NamedLabelsConfig(HeadConfig):
    """Configuration of a head with named labels, whatever it is made of.

    Attributes:
        num_labels: Size of the output.
        label2id: The name of each label, to its number.
    """

    num_labels: int
    label2id: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.label2id, self.num_labels)

    @property
    def id2label(self) -> dict[int, str]:
        """The name of each label by its number; ``LABEL_0`` and so on where none was given."""
        if self.label2id is None:
            return {number: f"LABEL_{number}" for number in range(self.num_labels)}
        return by_number(self.label2id)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LabelledConfig(NamedLabelsConfig, FeedForwardConfig):
    """Configuration of a head of linear layers with named labels."""


def by_number(label2id: Mapping[str, int]) -> dict[int, str]:
    """The name of each label by its number, in the order of the numbers."""
    return {number: label for label, number in sorted(label2id.items(), key=lambda own: own[1])}


def check_names(label2id: Mapping[str, int] | None, count: int) -> None:
    """Refuses label names that do not name each of `count` numbers once.

    Raises:
        ConfigError: If they do not.
    """
    if label2id is not None and sorted(label2id.values()) != list(range(count)):
        raise ConfigError(
            f"There are {count} labels or choices, but their names are numbered "
            f"{sorted(label2id.values())}: name every number below {count} once."
        )


def label_names(
    num_labels: int | None, id2label: Mapping[Any, str] | None, counted_by: str = "num_labels"
) -> dict[str, Any]:
    """The configuration fields ``num_labels`` and ``label2id`` from what users give.

    Args:
        num_labels: Number of labels; None takes it from the names, or else 2.
        id2label: Name of each label by number.
        counted_by: What the user knows the number as, for messages.

    Raises:
        LabelError: If two labels share a name, numbers are left out, the two arguments contradict
            each other, or they are no number and no mapping.
    """
    try:
        count = None if num_labels is None else operator.index(num_labels)
        by_number = None if id2label is None else {int(n): id2label[n] for n in id2label}
    except (TypeError, ValueError, IndexError) as error:
        raise LabelError(
            f"{counted_by}={num_labels!r} should be a number, and id2label={id2label!r} a mapping "
            "of numbers to names."
        ) from error
    if by_number is None:
        count = 2 if count is None else count
        return {"num_labels": count, "label2id": {f"LABEL_{i}": i for i in range(count)}}
    names = list(by_number.values())
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise LabelError(
            f"id2label gives the names {repeated} to several labels; make them unique."
        )
    if count is not None and count != len(names):
        raise LabelError(
            f"{counted_by}={count}, but id2label names {len(names)} labels; leave one out."
        )
    numbers = {name: number for number, name in by_number.items()}
    if sorted(numbers.values()) != list(range(len(names))):
        raise LabelError(
            f"id2label numbers the labels {sorted(numbers.values())}; name every number below "
            f"{len(names)} once."
        )
    return {"num_labels": len(names), "label2id": numbers}
