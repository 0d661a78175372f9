"""Language-model heads, whose output matrix is the model's own embeddings where those are tied."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.modeling_outputs import (
    CausalLMOutput,
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    Seq2SeqLMOutput,
)
from transformers.utils.generic import ModelOutput

from flexheads.activations import activation
from flexheads.errors import ConfigError, LabelError
from flexheads.heads.base import PredictionHead, norm_eps
from flexheads.heads.config import HeadConfig
from flexheads.heads.features import Features
from flexheads.heads.labels import InputShape, check_indices
from flexheads.heads.outputs import head_output
from flexheads.heads.source import Source
from flexheads.heads.written import filled_masks, likely_next, written_texts
from flexheads.specs import Need


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
    needs: ClassVar[Need | None] = "tokens"
    generates: ClassVar[bool] = False
    """Whether it can write one token after the other."""
    shift: ClassVar[int] = 0
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

    def forward(
        self, features: Features, *, logits_to_keep: int | Tensor = 0, **labels: Any
    ) -> ModelOutput:
        """See `PredictionHead.forward`.

        Args:
            features: What the backbone computed.
            logits_to_keep: Scores are computed for so many of the last positions, or for those
                that a tensor lists; 0 is all.
            labels: ``labels``, ``(batch, sequence)``, -100 not counted.

        Raises:
            LabelError: If there are labels, but not all scores are computed.
            ConfigError: If the output matrix is tied, and the model has no embeddings.
        """
        given, loss = labels.get("labels"), None
        hidden = features.scaled
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            if given is not None:
                raise LabelError(f"Head {self.name!r} has labels, so leave out logits_to_keep.")
            hidden = _kept(hidden, logits_to_keep)
        logits = self._score(hidden, features)
        if given is not None:
            end = logits.shape[1] - self.shift
            loss = self.loss(logits[:, :end], given[:, self.shift :].long())
        kind = self.output_class(features.output)
        output: ModelOutput = head_output(kind, features.output, loss=loss, logits=logits)
        return output

    def _score(self, hidden: Tensor, features: Features) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = features.undo(hidden)
        logits = functional.linear(hidden, self._matrix(features.embeddings), self.bias)
        if self.config.tied:
            logits = features.rescore(hidden, logits)
        if (cap := self.config.softcap) is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits

    def _matrix(self, embeddings: Tensor | None) -> Tensor:
        weight = embeddings if self.config.tied else self.weight
        if weight is None:
            raise ConfigError(f"Head {self.name!r} is tied, but this model has no embeddings.")
        return weight

    def output_class(self, output: ModelOutput) -> type[ModelOutput]:
        """The class of its output, as transformers' class over such a backbone has it.

        Args:
            output: The backbone's output.
        """
        return MaskedLMOutput

    def output_embeddings(self, embeddings: Tensor | None) -> nn.Linear:
        """A linear layer on the output matrix and the bias, which stay what they are.

        Args:
            embeddings: The weight of the model's input embeddings, for a tied matrix.

        Raises:
            ConfigError: If the output matrix is tied, and the model has no embeddings.
        """
        weight = self._matrix(embeddings)
        vocabulary, width = weight.shape
        layer = nn.Linear(width, vocabulary, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = weight, self.bias  # type: ignore[assignment]
        return layer

    def set_output_embeddings(self, layer: nn.Linear) -> None:
        """Takes over a bias, and a matrix unless it is tied; the vocabulary becomes as large."""
        if not self.config.tied:
            self.weight = nn.Parameter(layer.weight)
        if self.bias is not None and layer.bias is not None:
            self.bias = nn.Parameter(layer.bias)
        self.config = self.config.replace(vocab_size=layer.weight.shape[0])

    @torch.no_grad()
    def resize(self, size: int, embeddings: Tensor | None) -> None:
        """Follows embeddings that have been resized; new tokens get new rows and no bias.

        Args:
            size: The new size of the vocabulary.
            embeddings: The weight of the model's input embeddings, of that size already.
        """
        weight, kept = self._matrix(embeddings), min(size, self.num_outputs)
        if not self.config.tied:
            own = weight
            weight = own.new_empty(size, own.shape[1]).normal_(std=self.initializer_range)
            weight[:kept] = own[:kept]
        layer = nn.Linear(weight.shape[1], size, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.new_zeros(size))
            layer.bias[:kept] = self.bias[:kept]
        trains = [p.requires_grad for p in self.parameters(recurse=False)]
        self.set_output_embeddings(layer)
        for parameter, train in zip(self.parameters(recurse=False), trains, strict=True):
            parameter.requires_grad_(train)

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        """See `PredictionHead.check_labels`: token ids, one for each position that it scores."""
        if labels.get("labels") is not None:
            where = f"labels of head {self.name!r}"
            check_indices(where, labels["labels"], self.num_outputs, [(shape.rows, shape.length)])


def _kept(hidden: Tensor, which: int | Tensor) -> Tensor:
    """The positions whose scores are wanted, ``(batch, positions, hidden)``."""
    return hidden[:, -which:] if isinstance(which, int) else hidden[:, which]


class MaskedLMHead(LanguageModelHead):
    """Predicts the token at each position."""

    head_type = "masked_lm"

    def decode(  # type: ignore[override]  # its own options
        self, output: Any, source: Source | None = None, *, top_k: int = 5
    ) -> list[Any]:
        """The likeliest tokens at each mask.

        Args:
            output: What `forward` returned.
            source: ``input_ids`` and ``tokenizer`` are needed.
            top_k: How many for each mask.

        Returns:
            For each row the `top_k` likeliest tokens, each with ``score``, ``token``,
            ``token_str`` and ``sequence``; a list of such lists where a row has several masks.

        Raises:
            UnsupportedError: If ids or tokenizer are missing, or a row has no mask.
        """
        return filled_masks(output.logits, source, top_k)


class CausalLMHead(LanguageModelHead):
    """Predicts the token that follows each position."""

    head_type = "causal_lm"
    generates = True
    shift = 1

    def output_class(self, output: ModelOutput) -> type[ModelOutput]:
        """See `LanguageModelHead.output_class`."""
        if "encoder_last_hidden_state" in output:
            return Seq2SeqLMOutput
        fields = type(output).__dataclass_fields__  # type: ignore[attr-defined]
        if "cross_attentions" in fields:
            return CausalLMOutputWithCrossAttentions
        return CausalLMOutputWithPast if "past_key_values" in fields else CausalLMOutput

    def decode(  # type: ignore[override]  # its own options
        self,
        output: Any,
        source: Source | None = None,
        *,
        top_k: int = 5,
        return_full_text: bool = True,
        skip_special_tokens: bool = True,
    ) -> list[Any]:
        """The text of what was generated, or the tokens that may follow.

        Args:
            output: What ``generate`` returned, or `forward`.
            source: The ``tokenizer`` is needed; ``input_ids`` where the prompt is left out, and
                ``attention_mask`` where padding is on the right of what `forward` has read.
            top_k: How many tokens that may follow.
            return_full_text: Whether the prompt is a part of the text.
            skip_special_tokens: Leaves out tokens such as padding.

        Returns:
            For each sequence of ``generate`` its ``generated_text``; for each row of `forward` the
            `top_k` likeliest tokens, each with ``score``, ``token`` and ``token_str``.

        Raises:
            UnsupportedError: If something of `source` is missing.
        """
        if isinstance(output, Mapping) and "logits" in output and "sequences" not in output:
            return likely_next(output["logits"], source, top_k)
        return written_texts(
            output,
            source,
            return_full_text=return_full_text,
            skip_special_tokens=skip_special_tokens,
        )
