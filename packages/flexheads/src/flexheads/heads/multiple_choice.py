"""Multiple choice: one score for each of several continuations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import MultipleChoiceModelOutput

from flexheads.errors import ConfigError
from flexheads.heads.base import PooledHead
from flexheads.heads.config import PooledConfig, check_names
from flexheads.heads.features import Features


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MultipleChoiceConfig(PooledConfig):
    """Configuration of `MultipleChoiceHead`.

    Attributes:
        num_choices: Choices per example where the input does not tell, because it comes flat as
            ``(batch * choices, sequence)``; None where every input tells.
        label2id: Name of each choice, to its number.
    """

    num_choices: int | None = None
    label2id: Mapping[str, int] | None = None
    layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_choices is not None:
            check_names(self.label2id, self.num_choices)


class MultipleChoiceHead(PooledHead):
    """Scores each choice. Logits are ``(batch, choices)``."""

    head_type = "multiple_choice"
    config_class = MultipleChoiceConfig

    @property
    def num_outputs(self) -> int:
        return 1

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; ``labels`` is ``(batch,)``, the number of the right choice.

        Raises:
            ConfigError: If neither the input nor the configuration tells the number of choices.
        """
        choices = features.choices or self.config.num_choices
        if choices is None:
            raise ConfigError(
                f"Head {self.name!r} cannot tell the number of choices: give inputs of shape "
                "(batch, choices, sequence), or set num_choices."
            )
        logits = scores.view(-1, choices)
        given = labels.get("labels")
        return MultipleChoiceModelOutput(
            loss=None if given is None else self.loss(logits, given),
            logits=logits,
            hidden_states=features.output.get("hidden_states"),
            attentions=features.output.get("attentions"),
        )
