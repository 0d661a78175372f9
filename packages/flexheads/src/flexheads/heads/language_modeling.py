"""Language-model heads, whose output matrix is the model's own embeddings where those are tied."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput, MaskedLMOutput
from transformers.utils.generic import ModelOutput

from flexheads.activations import activation
from flexheads.errors import ConfigError
from flexheads.heads.base import PredictionHead, norm_eps
from flexheads.heads.config import HeadConfig
from flexheads.heads.features import Features
from flexheads.heads.outputs import head_output


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LanguageModelConfig(HeadConfig):
    """Configuration of language-model heads.

    Attributes:
        vocab_size: Size of the vocabulary; None takes the model's.
        embedding_size: Size of the embeddings; None takes the model's.
        layers: Number of linear layers, the output matrix included.
        activation_function: Activation behind each layer but the last, or None.
        layer_norm: Whether a layer norm follows each of those.
        bias: Whether the output has a bias.
        tied: Whether the output matrix is the input embeddings; None does as the model's
            ``tie_word_embeddings`` says.
        softcap: Logits are kept below this by ``softcap * tanh(logits / softcap)``
            (arXiv:2408.00118, section 2); None leaves them as they are.
    """

    vocab_size: int | None = None
    embedding_size: int | None = None
    layers: int = 2
    activation_function: str | None = "gelu"
    layer_norm: bool = True
    bias: bool = True
    tied: bool | None = None
    softcap: float | None = None

    def completed(self, model_config: PretrainedConfig) -> LanguageModelConfig:
        """The configuration with what it leaves to the model filled in."""
        embedding_size = getattr(model_config, "embedding_size", None) or model_config.hidden_size
        tied = self.tied
        if tied is None:
            tied = bool(getattr(model_config, "tie_word_embeddings", True))
        return self.replace(
            vocab_size=self.vocab_size or model_config.vocab_size,
            embedding_size=self.embedding_size or embedding_size,
            tied=tied,
        )


class _Transform(nn.Module):
    """One layer of a language-model head below the output matrix."""

    def __init__(self, inputs: int, config: LanguageModelConfig, eps: float) -> None:
        super().__init__()
        size = int(config.embedding_size or inputs)
        self.dense = nn.Linear(inputs, size)
        self.activation = activation(config.activation_function)
        self.norm = nn.LayerNorm(size, eps=eps) if config.layer_norm else None

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.dense(hidden)
        if self.activation is not None:
            hidden = self.activation(hidden)
        return hidden if self.norm is None else self.norm(hidden)


class LanguageModelHead(PredictionHead):
    """Scores the vocabulary at every position. Logits are ``(batch, sequence, vocabulary)``.

    Where the output matrix is tied it is no parameter of the head: it is read from the features,
    so it is neither saved twice nor left behind when the embeddings are resized.
    """

    config_class = LanguageModelConfig
    output_class: type[ModelOutput]
    shift = 0
    """How far ahead of its position a token is predicted."""

    def __init__(
        self, name: str, config: LanguageModelConfig, model_config: PretrainedConfig
    ) -> None:
        config = config.completed(model_config)
        super().__init__(name, config, model_config)
        eps = norm_eps(model_config)
        width, vocabulary = int(config.embedding_size or 0), int(config.vocab_size or 0)
        self.layers = nn.ModuleList(
            _Transform(self.hidden_size if number == 0 else width, config, eps)
            for number in range(config.layers - 1)
        )
        if not config.tied:
            self.weight = nn.Parameter(torch.empty(vocabulary, width))
            nn.init.normal_(self.weight, std=self.initializer_range)
        self.bias = nn.Parameter(torch.zeros(vocabulary)) if config.bias else None
        self.initialise()

    @property
    def num_outputs(self) -> int:
        return int(self.config.vocab_size)

    def forward(self, features: Features, **labels: Any) -> ModelOutput:
        """See `PredictionHead.forward`; ``labels`` is ``(batch, sequence)``, -100 not counted."""
        hidden = features.scaled
        for layer in self.layers:
            hidden = layer(hidden)
        weight = features.embeddings if self.config.tied else self.weight
        if weight is None:
            raise ConfigError(f"Head {self.name!r} is tied, but this model has no embeddings.")
        hidden = features.undo(hidden)
        logits = functional.linear(hidden, weight, self.bias)
        if self.config.tied:
            logits = features.rescore(hidden, logits)
        if (cap := self.config.softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        given, loss = labels.get("labels"), None
        if given is not None:
            end = logits.shape[1] - self.shift
            loss = self.loss(logits[:, :end], given[:, self.shift :])
        output: ModelOutput = head_output(
            self.output_class, features.output, loss=loss, logits=logits
        )
        return output


class MaskedLMHead(LanguageModelHead):
    """Predicts the token at each position."""

    head_type = "masked_lm"
    output_class = MaskedLMOutput


class CausalLMHead(LanguageModelHead):
    """Predicts the token that follows each position."""

    head_type = "causal_lm"
    output_class = CausalLMOutput
    shift = 1
