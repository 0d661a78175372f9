"""Sequence classification and regression, and pairs of sentences."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import NextSentencePredictorOutput, SequenceClassifierOutput
from transformers.utils.generic import ModelOutput

from flexheads.activations import activation
from flexheads.errors import ConfigError
from flexheads.heads.base import (
    Features,
    LabelledConfig,
    PredictionHead,
    Stacked,
    classification_loss,
)
from flexheads.heads.outputs import head_output

ProblemType = Literal["regression", "single_label_classification", "multi_label_classification"]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ClassificationConfig(LabelledConfig):
    """Configuration of `ClassificationHead`.

    Attributes:
        use_pooler: Read the trained pooler instead of the architecture's own token.
        bias: Whether the last layer has a bias.
        problem_type: Which loss; None takes regression for one label, else one label per row.
    """

    layers: int = 2
    use_pooler: bool = False
    bias: bool = True
    problem_type: ProblemType | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.problem_type not in (None, *ProblemType.__args__):  # type: ignore[attr-defined]
            raise ConfigError(f"problem_type={self.problem_type!r} is unknown.")


class ClassificationHead(PredictionHead):
    """Classifies a sequence; regression for one label. Logits are ``(batch, num_labels)``."""

    head_type = "classification"
    config_class: ClassVar[type[ClassificationConfig]] = ClassificationConfig
    output_class: ClassVar[type[ModelOutput]] = SequenceClassifierOutput

    def __init__(
        self, name: str, config: ClassificationConfig, model_config: PretrainedConfig
    ) -> None:
        super().__init__(name, config, model_config)
        sizes = [self.hidden_size] * config.layers + [config.num_labels]
        function = activation(config.activation_function)
        self.layers = Stacked(sizes, function, self.dropout_prob, config.bias)
        self.initialise()

    @property
    def problem_type(self) -> str:
        """The kind of loss."""
        if self.config.problem_type is not None:
            return str(self.config.problem_type)
        return "regression" if self.config.num_labels == 1 else "single_label_classification"

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss: mean squared error, binary or plain cross-entropy."""
        if self.problem_type == "regression":
            return nn.functional.mse_loss(logits.reshape(-1), labels.reshape(-1).to(logits.dtype))
        if self.problem_type == "multi_label_classification":
            return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return classification_loss(logits, labels)

    def forward(self, features: Features, **labels: Any) -> Any:
        """See `PredictionHead.forward`; ``labels`` is ``(batch,)`` or ``(batch, num_labels)``."""
        logits = self.layers(features.pooled(self.config.use_pooler))
        given = labels.get("labels")
        loss = None if given is None else self.loss(logits, given)
        return head_output(self.output_class, features.output, loss=loss, logits=logits)


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
