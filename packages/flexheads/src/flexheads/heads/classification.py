"""Sequence classification and regression, and pairs of sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor
from transformers.modeling_outputs import NextSentencePredictorOutput, SequenceClassifierOutput
from transformers.utils.generic import ModelOutput

from flexheads.errors import ConfigError
from flexheads.heads.base import PooledHead
from flexheads.heads.config import LabelledConfig, PooledConfig
from flexheads.heads.features import Features
from flexheads.heads.labels import InputShape, check_indices, check_numbers, check_shares
from flexheads.heads.losses import ANY_NUMBER, NUMBERS, ONE_OF_MANY
from flexheads.heads.outputs import head_output

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]

_LOSSES = {
    "regression": NUMBERS,
    "single_label_classification": ONE_OF_MANY,
    "multi_label_classification": ANY_NUMBER,
}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ClassificationConfig(LabelledConfig, PooledConfig):
    """Configuration of `ClassificationHead`.

    Attributes:
        problem_type: Which kind of loss; None takes regression for one label, else one label per
            row.
        threshold: Where any number of labels can hold, the probability from which one does.
    """

    layers: int = 2
    problem_type: ProblemType | None = None
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.problem_type not in (None, *_LOSSES):
            raise ConfigError(f"problem_type={self.problem_type!r} is unknown.")
        if type(self.threshold) not in (int, float) or not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold={self.threshold!r} should be a number from 0 to 1.")


class ClassificationHead(PooledHead):
    """Classifies a sequence; regression for one label. Logits are ``(batch, num_labels)``."""

    head_type = "classification"
    config_class: ClassVar[type[ClassificationConfig]] = ClassificationConfig
    output_class: ClassVar[type[ModelOutput]] = SequenceClassifierOutput

    @property
    def problem_type(self) -> str:
        """The kind of loss."""
        if self.config.problem_type is not None:
            return str(self.config.problem_type)
        return "regression" if self.config.num_labels == 1 else "single_label_classification"

    @property
    def losses(self) -> tuple[str, ...]:
        return _LOSSES[self.problem_type]

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        if (given := labels.get("labels")) is None:
            return
        where, count, rows = f"labels of head {self.name!r}", self.config.num_labels, shape.rows
        if self.problem_type == "single_label_classification":
            check_indices(where, given, count, [(rows,), (rows, 1)])
        elif self.problem_type == "multi_label_classification":
            check_shares(where, given, [(rows, count)])
        else:
            check_numbers(where, given, [(rows, count), *([(rows,)] if count == 1 else [])])

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; ``labels`` is ``(batch,)`` or ``(batch, num_labels)``."""
        given = labels.get("labels")
        loss = None if given is None else self.loss(scores, given)
        return head_output(self.output_class, features.output, loss=loss, logits=scores)


class MultiLabelClassificationHead(ClassificationHead):
    """Classifies a sequence into any number of labels at once (binary cross-entropy)."""

    head_type = "multilabel_classification"

    @property
    def problem_type(self) -> str:
        """Always several labels per row."""
        return "multi_label_classification"


class NextSentenceHead(ClassificationHead):
    """Whether a second sentence follows the first (label 0) or not (label 1)."""

    head_type = "next_sentence"
    output_class = NextSentencePredictorOutput
