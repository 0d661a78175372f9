"""Heads that read every token: tagging and extractive question answering."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_outputs import QuestionAnsweringModelOutput, TokenClassifierOutput

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

IGNORED = -100


class TaggingHead(PredictionHead):
    """Classifies every token. Logits are ``(batch, sequence, num_labels)``."""

    head_type = "tagging"
    config_class = LabelledConfig

    def __init__(self, name: str, config: LabelledConfig, model_config: PretrainedConfig) -> None:
        super().__init__(name, config, model_config)
        sizes = [self.hidden_size] * config.layers + [config.num_labels]
        self.layers = Stacked(sizes, activation(config.activation_function), self.dropout_prob)
        self.initialise()

    def forward(self, features: Features, **labels: Any) -> TokenClassifierOutput:
        """See `PredictionHead.forward`; ``labels`` is ``(batch, sequence)``.

        Labels of -100, and of positions outside of the attention mask, do not count.
        """
        logits = self.layers(features.hidden)
        given, mask, loss = labels.get("labels"), features.attention_mask, None
        if given is not None:
            if mask is not None and mask.dim() == 2:
                given = given.masked_fill(mask == 0, IGNORED)
            loss = classification_loss(logits, given)
        output: TokenClassifierOutput = head_output(
            TokenClassifierOutput, features.output, loss=loss, logits=logits
        )
        return output


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class QuestionAnsweringConfig(LabelledConfig):
    """Configuration of `QuestionAnsweringHead`; the two outputs are start and end.

    Attributes:
        scaled: Whether it reads the hidden states as language-model heads do; makes a difference
            only for architectures that scale them, and there the `adapters` library does.
    """

    num_labels: int = 2
    scaled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_labels != 2:
            raise ConfigError(
                f"A question-answering head scores start and end, so num_labels is 2, "
                f"not {self.num_labels}."
            )


class QuestionAnsweringHead(PredictionHead):
    """Scores every token as start and end of the answer; each ``(batch, sequence)``."""

    head_type = "question_answering"
    config_class = QuestionAnsweringConfig
    label_names = ("start_positions", "end_positions")

    def __init__(
        self, name: str, config: QuestionAnsweringConfig, model_config: PretrainedConfig
    ) -> None:
        super().__init__(name, config, model_config)
        sizes = [self.hidden_size] * config.layers + [config.num_labels]
        self.layers = Stacked(sizes, activation(config.activation_function), self.dropout_prob)
        self.initialise()

    def forward(self, features: Features, **labels: Any) -> QuestionAnsweringModelOutput:
        """See `PredictionHead.forward`; ``start_positions`` and ``end_positions`` are ``(batch,)``.

        Positions beyond the sequence do not count.
        """
        hidden = features.scaled if self.config.scaled else features.hidden
        start, end = self.layers(hidden).unbind(dim=-1)
        starts, ends, loss = labels.get("start_positions"), labels.get("end_positions"), None
        if starts is not None and ends is not None:
            loss = (_position_loss(start, starts) + _position_loss(end, ends)) / 2
        output: QuestionAnsweringModelOutput = head_output(
            QuestionAnsweringModelOutput,
            features.output,
            loss=loss,
            start_logits=start.contiguous(),
            end_logits=end.contiguous(),
        )
        return output


def _position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    positions = positions.reshape(-1).clamp(min=0)
    beyond = positions >= logits.shape[1]
    return classification_loss(logits, positions.masked_fill(beyond, IGNORED))
