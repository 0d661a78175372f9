"""Heads that read every token: tagging and extractive question answering."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import QuestionAnsweringModelOutput, TokenClassifierOutput

from flexheads.errors import ConfigError
from flexheads.heads.base import FeedForwardHead
from flexheads.heads.config import LabelledConfig
from flexheads.heads.features import Features
from flexheads.heads.losses import IGNORED
from flexheads.heads.outputs import head_output


class TaggingHead(FeedForwardHead):
    """Classifies every token. Logits are ``(batch, sequence, num_labels)``."""

    head_type = "tagging"
    config_class = LabelledConfig

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; ``labels`` is ``(batch, sequence)``.

        Labels of -100, and of positions outside of the attention mask, do not count.
        """
        given, mask, loss = labels.get("labels"), features.attention_mask, None
        if given is not None:
            if mask is not None and mask.dim() == 2:
                given = given.masked_fill(mask == 0, IGNORED)
            loss = self.loss(scores, given)
        return head_output(TokenClassifierOutput, features.output, loss=loss, logits=scores)


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


class QuestionAnsweringHead(FeedForwardHead):
    """Scores every token as start and end of the answer; each ``(batch, sequence)``."""

    head_type = "question_answering"
    config_class = QuestionAnsweringConfig
    label_names = ("start_positions", "end_positions")

    def read(self, features: Features) -> Tensor:
        return features.scaled if self.config.scaled else features.hidden

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; labels are ``start_positions``, ``end_positions``.

        Both are ``(batch,)``. Positions beyond the sequence do not count.
        """
        start, end = scores.unbind(dim=-1)
        starts, ends, loss = labels.get("start_positions"), labels.get("end_positions"), None
        if starts is not None and ends is not None:
            loss = (self._position_loss(start, starts) + self._position_loss(end, ends)) / 2
        return head_output(
            QuestionAnsweringModelOutput,
            features.output,
            loss=loss,
            start_logits=start.contiguous(),
            end_logits=end.contiguous(),
        )

    def _position_loss(self, logits: Tensor, positions: Tensor) -> Tensor:
        positions = positions.reshape(-1).clamp(min=0)
        beyond = positions >= logits.shape[1]
        return self.loss(logits, positions.masked_fill(beyond, IGNORED))
