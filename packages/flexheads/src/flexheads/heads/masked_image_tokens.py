"""Masked image modelling by visual tokens: which of a codebook stands for a patch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import MaskedLMOutput

from flexheads.errors import ConfigError
from flexheads.heads.base import FeedForwardHead, norm_eps
from flexheads.heads.config import FeedForwardConfig
from flexheads.heads.features import Features
from flexheads.heads.labels import InputShape, check_indices
from flexheads.heads.outputs import head_output
from flexheads.heads.source import Source


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class MaskedImageTokensConfig(FeedForwardConfig):
    """Configuration of `MaskedImageTokensHead`.

    Attributes:
        vocab_size: Size of the codebook; None takes the model's.
    """

    vocab_size: int | None = None


class MaskedImageTokensHead(FeedForwardHead):
    """Scores a codebook at every patch (arXiv:2106.08254, section 2.3).

    A layer norm stands below the layers. Logits are ``(batch, patches, vocabulary)``.
    """

    head_type = "masked_image_tokens"
    needs = "pixels"
    config_class = MaskedImageTokensConfig

    def __init__(
        self, name: str, config: MaskedImageTokensConfig, model_config: PretrainedConfig
    ) -> None:
        size = config.vocab_size or getattr(model_config, "vocab_size", None)
        if size is None:
            raise ConfigError("This model's configuration has no vocab_size; give vocab_size.")
        super().__init__(name, config.replace(vocab_size=size), model_config)
        self.norm = nn.LayerNorm(self.hidden_size, eps=norm_eps(model_config))

    @property
    def num_outputs(self) -> int:
        return int(self.config.vocab_size)

    def read(self, features: Features) -> Tensor:
        """What the first layer gets: every patch, ``(batch, patches, hidden)``."""
        normed: Tensor = self.norm(features.hidden[:, features.patches_from :])
        return normed

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        if (given := labels.get("labels")) is not None:
            where = f"labels of head {self.name!r}"
            check_indices(where, given, self.num_outputs, [(shape.rows, None)])

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; ``labels`` is ``(batch, patches)``, -100 not counted.

        What counts are the patches that are hidden from the model.
        """
        given = labels.get("labels")
        loss = None if given is None else self.loss(scores, given)
        return head_output(MaskedLMOutput, features.output, loss=loss, logits=scores)

    def decode(self, output: Any, source: Source | None = None, **options: Any) -> list[list[int]]:
        """The token of the codebook that fits each patch best, a list of numbers for each row."""
        found: list[list[int]] = output.logits.argmax(dim=-1).tolist()
        return found
