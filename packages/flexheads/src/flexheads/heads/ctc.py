"""Connectionist temporal classification: text from sound, without saying which frame is what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutput

from flexheads.errors import ConfigError, LabelError, UnsupportedError
from flexheads.heads.base import FeedForwardHead
from flexheads.heads.config import FeedForwardConfig
from flexheads.heads.features import Features
from flexheads.heads.frames import OfFrames, frame_lengths, with_lengths
from flexheads.heads.labels import InputShape, check_indices
from flexheads.heads.losses import IGNORED
from flexheads.heads.outputs import head_output
from flexheads.heads.source import Source


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CTCConfig(FeedForwardConfig):
    """Configuration of `CTCHead`.

    Attributes:
        vocab_size: Size of the vocabulary, the blank included; None takes the model's.
        blank: Number of the blank; None takes the model's ``pad_token_id``.
        reduction: Losses of the rows are added up, or each is divided by its number of labels and
            the mean is taken.
        zero_infinity: Whether a row with fewer frames than its labels need counts as zero, instead
            of infinity.
    """

    vocab_size: int | None = None
    blank: int | None = None
    reduction: Literal["sum", "mean"] = "mean"
    zero_infinity: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction not in ("sum", "mean"):
            raise ConfigError(f'reduction={self.reduction!r} should be "sum" or "mean".')
        if self.loss is not None:
            raise ConfigError(f"loss={self.loss!r} makes no sense here: a CTC head has its own.")

    def completed(self, model_config: PretrainedConfig) -> CTCConfig:
        """The configuration with what it leaves to the model filled in.

        Raises:
            ConfigError: If the model has no such value, or the blank is outside of the vocabulary.
        """
        size = self.vocab_size or getattr(model_config, "vocab_size", None)
        blank = self.blank
        if blank is None:
            blank = getattr(model_config, "pad_token_id", None)
        if size is None or blank is None:
            raise ConfigError(
                "This model's configuration has no vocab_size or no pad_token_id; give vocab_size "
                "and blank."
            )
        if not 0 <= blank < size:
            raise ConfigError(f"blank={blank} is not below vocab_size={size}.")
        return self.replace(vocab_size=size, blank=blank)


@dataclasses.dataclass
class CTCOutput(OfFrames, CausalLMOutput):
    """What a `CTCHead` gives: ``logits`` ``(batch, frames, vocabulary)``, and a ``loss``."""


class CTCHead(FeedForwardHead):
    """Scores the vocabulary at every frame (Graves et al. 2006, the CTC loss of section 4)."""

    head_type = "ctc"
    needs = "sound"
    config_class = CTCConfig

    def __init__(self, name: str, config: CTCConfig, model_config: PretrainedConfig) -> None:
        super().__init__(name, config.completed(model_config), model_config)

    @property
    def num_outputs(self) -> int:
        return int(self.config.vocab_size)

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        if (given := labels.get("labels")) is None:
            return
        where = f"labels of head {self.name!r}"
        check_indices(where, given, self.num_outputs, [(shape.rows, None)])
        if not torch.compiler.is_compiling() and bool((given == self.config.blank).any()):
            raise LabelError(
                f"{where} hold the blank, {self.config.blank}, which no text has; pad with "
                f"{IGNORED}."
            )

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; ``labels`` is ``(batch, any)``, padded with -100."""
        given, loss = labels.get("labels"), None
        if given is not None:
            loss = self._ctc(scores, given, frame_lengths(features))
        output = head_output(CTCOutput, features.output, loss=loss, logits=scores)
        return with_lengths(output, features)

    def _ctc(self, scores: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        real = labels != IGNORED
        probabilities = scores.log_softmax(dim=-1, dtype=torch.float32).transpose(0, 1)
        # The kernels of cuDNN refuse some lengths and are not deterministic.
        with torch.backends.cudnn.flags(enabled=False):
            return functional.ctc_loss(
                probabilities,
                labels.masked_select(real),
                lengths,
                real.sum(dim=-1),
                blank=self.config.blank,
                reduction=self.config.reduction,
                zero_infinity=self.config.zero_infinity,
            )

    def decode(self, output: Any, source: Source | None = None, **options: Any) -> list[Any]:
        """The best text of each row, greedily: ``{"text": ...}``.

        Args:
            output: What `forward` returned.
            source: Its tokenizer writes the text.
            options: For the tokenizer's ``decode``.

        Raises:
            UnsupportedError: If there is no tokenizer.
        """
        if source is None or source.tokenizer is None:
            raise UnsupportedError("A CTC head needs a tokenizer to decode: give it in the source.")
        # Repeats are gone already; some tokenizers would drop those that a blank kept apart.
        options = {"skip_special_tokens": True, "group_tokens": False, **options}
        return [
            {"text": source.tokenizer.decode(tokens, **options)}
            for tokens in self.best_tokens(output)
        ]

    def best_tokens(self, output: Any) -> list[list[int]]:
        """The tokens of each row's best path, without repeats and blanks."""
        best = output.logits.argmax(dim=-1)
        rows = (frames[: output.frames_of(row)] for row, frames in enumerate(best))
        once = (torch.unique_consecutive(row) for row in rows)
        return [row[row != self.config.blank].tolist() for row in once]
