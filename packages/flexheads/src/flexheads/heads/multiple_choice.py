"""Multiple choice: one score for each of several continuations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_outputs import MultipleChoiceModelOutput

from flexheads.activations import activation
from flexheads.errors import ConfigError
from flexheads.heads.base import (
    Features,
    HeadConfig,
    PredictionHead,
    Stacked,
    check_names,
    classification_loss,
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MultipleChoiceConfig(HeadConfig):
    """Configuration of `MultipleChoiceHead`.

    Attributes:
        num_choices: Choices per example where the input does not tell, because it comes flat as
            ``(batch * choices, sequence)``; None where every input tells.
        label2id: Name of each choice, to its number.
        layers: Number of linear layers.
        activation_function: Activation between them, or None.
        use_pooler: Read the trained pooler instead of the architecture's own token.
    """

    num_choices: int | None = None
    label2id: Mapping[str, int] | None = None
    layers: int = 2
    activation_function: str | None = "tanh"
    use_pooler: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_choices is not None:
            check_names(self.label2id, self.num_choices)


class MultipleChoiceHead(PredictionHead):
    """Scores each choice. Logits are ``(batch, choices)``."""

    head_type = "multiple_choice"
    config_class = MultipleChoiceConfig

    def __init__(
        self, name: str, config: MultipleChoiceConfig, model_config: PretrainedConfig
    ) -> None:
        super().__init__(name, config, model_config)
        sizes = [self.hidden_size] * config.layers + [1]
        self.layers = Stacked(sizes, activation(config.activation_function), self.dropout_prob)
        self.initialise()

    def forward(self, features: Features, **labels: Any) -> MultipleChoiceModelOutput:
        """See `PredictionHead.forward`; ``labels`` is ``(batch,)``, the number of the right choice.

        Raises:
            ConfigError: If neither the input nor the configuration tells the number of choices.
        """
        choices = features.choices or self.config.num_choices
        if choices is None:
            raise ConfigError(
                f"Head {self.name!r} cannot tell the number of choices: give inputs of shape "
                "(batch, choices, sequence), or set num_choices."
            )
        logits = self.layers(features.pooled(self.config.use_pooler)).view(-1, choices)
        given = labels.get("labels")
        return MultipleChoiceModelOutput(
            loss=None if given is None else classification_loss(logits, given),
            logits=logits,
            hidden_states=features.output.get("hidden_states"),
            attentions=features.output.get("attentions"),
        )
