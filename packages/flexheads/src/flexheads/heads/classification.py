"""Sequence classification and regression, and pairs of sentences."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
from flexheads.heads.pooling import real_mean, real_positions
from flexheads.heads.source import Source

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
        late: Whether every token is scored, and the scores are averaged over all that are no
            padding, instead of scoring one vector.
        threshold: Where any number of labels can hold, the probability from which one does.
    """

    layers: int = 2
    problem_type: ProblemType | None = None
    late: bool = False
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.problem_type not in (None, *_LOSSES):
            raise ConfigError(f"problem_type={self.problem_type!r} is unknown.")
        if self.late and self.pooled_by is not None:
            raise ConfigError(f"late=True leaves nothing to do for pooling={self.pooled_by!r}.")


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

    def read(self, features: Features) -> Tensor:
        return features.hidden if self.config.late else super().read(features)

    @property
    def packs(self) -> bool:
        """See `FeedForwardHead.packs`."""
        return type(self).finish is ClassificationHead.finish and not self.config.late

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; ``labels`` is ``(batch,)`` or ``(batch, num_labels)``."""
        if self.config.late:
            scores = real_mean(scores, real_positions(features))
        given = labels.get("labels")
        loss = None if given is None else self.loss(scores, given)
        return head_output(self.output_class, features.output, loss=loss, logits=scores)

    def decode(
        self,
        output: Any,
        source: Source | None = None,
        *,
        top_k: int | None = None,
        threshold: float | None = None,
        **options: Any,
    ) -> list[Any]:
        """The labels of each row with their scores, the best first.

        Args:
            output: What `forward` returned.
            source: Not needed.
            top_k: How many labels at most; None gives the best one by itself, not in a list, or
                where any number can hold, those that do.
            threshold: The score from which a label holds, in place of the configuration's.
            options: None more.

        Returns:
            For each row ``{"label", "score"}``, or a list of such. Scores are probabilities, which
            sum up to 1 where one label holds; in regression they are the values themselves, in the
            order of the labels, and one alone is by itself.

        Raises:
            ConfigError: If `top_k` is smaller than 1.
        """
        check_top_k(top_k)
        names, logits = self.config.id2label, output.logits.float()
        if self.problem_type == "regression":
            rows = [_named(names, row) for row in logits.tolist()]
            return [row[0] for row in rows] if len(names) == 1 else rows
        if self.problem_type == "single_label_classification":
            ranked = [_ranked(names, row) for row in logits.softmax(-1).tolist()]
            return [row[:top_k] if top_k else row[0] for row in ranked]
        ranked = [_ranked(names, row) for row in logits.sigmoid().tolist()]
        if top_k:
            return [row[:top_k] for row in ranked]
        least = self.config.threshold if threshold is None else threshold
        return [[label for label in row if label["score"] >= least] for row in ranked]


def check_top_k(top_k: int | None) -> None:
    """Refuses a number of results that has no meaning.

    Raises:
        ConfigError: If it is smaller than 1.
    """
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k} should be at least 1.")


def _named(names: Mapping[int, str], scores: Sequence[float]) -> list[dict[str, Any]]:
    return [{"label": names[number], "score": score} for number, score in enumerate(scores)]


def _ranked(names: Mapping[int, str], scores: Sequence[float]) -> list[dict[str, Any]]:
    return sorted(_named(names, scores), key=lambda label: -label["score"])


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
