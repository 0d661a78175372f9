"""Regression of several named numbers, in their own units."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

from flexheads.errors import ConfigError
from flexheads.heads.base import PooledHead
from flexheads.heads.config import LabelledConfig, PooledConfig
from flexheads.heads.features import Features
from flexheads.heads.labels import InputShape, check_numbers
from flexheads.heads.losses import NUMBERS
from flexheads.heads.outputs import head_output
from flexheads.heads.source import Source


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class RegressionConfig(LabelledConfig, PooledConfig):
    """Configuration of `RegressionHead`; its labels are the targets.

    Attributes:
        num_labels: Number of targets.
        mean: The mean of each target in the training data, in its own unit; None is 0.
        std: The standard deviation of each, in its own unit; None is 1. The loss is taken of
            standardised values, so that large units do not drown small ones.
    """

    num_labels: int = 1
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mean", "std"):
            self._check_numbers(name, self.get(name))
        if any(value <= 0 for value in self.std or ()):
            raise ConfigError(f"std={list(self.std or ())} should be greater than 0 everywhere.")

    def _check_numbers(self, name: str, values: Any) -> None:
        if values is None:
            return
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ConfigError(f"{name}={values!r} should be a list with a number for each target.")
        if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            raise ConfigError(f"{name}={list(values)!r} should be finite numbers.")
        if len(values) != self.num_labels:
            raise ConfigError(
                f"{name} has {len(values)} values, but there are {self.num_labels} targets "
                f"({', '.join(self.id2label.values())})."
            )


class RegressionHead(PooledHead):
    """Predicts numbers of a sequence. Logits are ``(batch, targets)``, in the targets' units.

    A label that is NaN is not known and does not count, so rows may lack some of their targets.
    """

    head_type = "regression"
    config_class: ClassVar[type[RegressionConfig]] = RegressionConfig

    @property
    def losses(self) -> tuple[str, ...]:
        return NUMBERS

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        if (given := labels.get("labels")) is None:
            return
        count = self.config.num_labels
        if isinstance(given, Tensor) and given.is_floating_point():
            given = given.masked_fill(given.isnan(), 0.0)
        shapes = [(shape.rows, count), *([(shape.rows,)] if count == 1 else [])]
        check_numbers(f"labels of head {self.name!r}", given, shapes)

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; ``labels`` is ``(batch, targets)``, in their units."""
        given, loss = labels.get("labels"), None
        if given is not None:
            # Standardised before they get the model's precision, which may be too low for units.
            own = given.reshape(scores.shape)
            own = own.to(torch.promote_types(own.dtype, scores.dtype))
            loss = self._loss(scores, (own - self._mean(own)) / self._std(own))
        logits = scores
        if self.config.mean is not None or self.config.std is not None:
            logits = scores.to(torch.promote_types(scores.dtype, torch.float32))
            logits = logits * self._std(logits) + self._mean(logits)
        return head_output(SequenceClassifierOutput, features.output, loss=loss, logits=logits)

    def _mean(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.config.mean or [0.0] * self.num_outputs)

    def _std(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.config.std or [1.0] * self.num_outputs)

    def _loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The mean over the labels that are known; 0 where none is."""
        known = ~labels.isnan()
        # A label that equals the score costs nothing under any of these losses.
        labels = torch.where(known, labels.to(scores.dtype), scores.detach())
        return self.loss(scores, labels) * (known.numel() / known.sum().clamp(min=1))

    def decode(
        self, output: Any, source: Source | None = None, **options: Any
    ) -> list[dict[str, float]]:
        """The value of each target by its name, one mapping for each row."""
        names = self.config.id2label.values()
        return [dict(zip(names, row, strict=True)) for row in output.logits.float().tolist()]
