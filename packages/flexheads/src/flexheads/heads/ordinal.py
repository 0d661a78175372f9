"""Ordinal regression: levels that have an order (CORAL)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from flexheads.errors import ConfigError
from flexheads.heads.base import PooledHead
from flexheads.heads.config import LabelledConfig, PooledConfig
from flexheads.heads.features import Features
from flexheads.heads.labels import InputShape, check_indices
from flexheads.heads.outputs import head_output
from flexheads.heads.source import Source


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class OrdinalConfig(LabelledConfig, PooledConfig):
    """Configuration of `OrdinalHead`; its labels are the levels, from the lowest to the highest.

    Attributes:
        num_labels: Number of levels, at least 2.
        bias: False: each level has a bias of its own.
    """

    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_labels < 2:
            raise ConfigError(f"num_labels={self.num_labels}, but there are at least 2 levels.")
        if self.bias:
            raise ConfigError("bias=True has no meaning here: each level has a bias of its own.")


class OrdinalHead(PooledHead):
    """Ranks a sequence by consistent rank logits (CORAL, arXiv:1901.07884).

    One score for a sequence, and one bias for each level but the last; a level is passed with the
    probability ``sigmoid(score + bias)``. Logits are ``(batch, levels - 1)``.

    Attributes:
        level_bias: The biases, ``(levels - 1,)``.
    """

    head_type = "ordinal"
    config_class: ClassVar[type[OrdinalConfig]] = OrdinalConfig

    def __init__(self, name: str, config: Any, model_config: PretrainedConfig) -> None:
        super().__init__(name, config, model_config)
        self.level_bias = nn.Parameter(torch.zeros(self.num_outputs))

    @classmethod
    def labels_in(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int | None:
        """See `PredictionHead.labels_in`; there is one more than biases."""
        biases = tensors.get("level_bias")
        return None if biases is None else int(biases.shape[0]) + 1

    @property
    def losses(self) -> tuple[str, ...]:
        return ("coral",)

    @property
    def num_outputs(self) -> int:
        return int(self.config.num_labels) - 1

    @property
    def sizes(self) -> list[int]:
        return [*super().sizes[:-1], 1]

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        if (given := labels.get("labels")) is not None:
            where, rows = f"labels of head {self.name!r}", shape.rows
            check_indices(where, given, self.config.num_labels, [(rows,), (rows, 1)])

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; ``labels`` is ``(batch,)``, numbers of levels."""
        logits, given = scores + self.level_bias, labels.get("labels")
        loss = None if given is None else self.loss(logits, given.reshape(-1))
        return head_output(SequenceClassifierOutput, features.output, loss=loss, logits=logits)

    def levels(self, logits: Tensor) -> Tensor:
        """The number of the level of each row, ``(batch,)``: how many are passed likely."""
        return (_passed(logits) > 0.5).sum(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """The probability of each level, ``(batch, levels)``; they sum up to 1."""
        passed = _passed(logits)
        all_, none = torch.ones_like(passed[:, :1]), torch.zeros_like(passed[:, :1])
        return torch.cat([all_, passed], dim=-1) - torch.cat([passed, none], dim=-1)

    def decode(
        self, output: Any, source: Source | None = None, **options: Any
    ) -> list[dict[str, Any]]:
        """The level of each row, its probability, and that of every level.

        Returns:
            ``{"label", "score", "probabilities": {label: probability}}`` for each row. The label
            is the paper's, which is the median of the levels and need not be the likeliest.
        """
        names, logits = self.config.id2label, output.logits.float()
        every, found = self.probabilities(logits).tolist(), self.levels(logits).tolist()
        return [
            {
                "label": names[level],
                "score": row[level],
                "probabilities": dict(zip(names.values(), row, strict=True)),
            }
            for level, row in zip(found, every, strict=True)
        ]


def _passed(logits: Tensor) -> Tensor:
    """The probability that each level is passed; never more than that of one below.

    At the loss's minimum the biases are in order (the paper's theorem 1); this also holds where
    training has not got there.
    """
    return logits.sigmoid().cummin(dim=-1).values
