"""Heads that detect which tokens were replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import TokenClassifierOutput

from flexheads.heads.base import FeedForwardHead
from flexheads.heads.config import FeedForwardConfig
from flexheads.heads.features import Features
from flexheads.heads.inputs import Samples, Texts
from flexheads.heads.labels import InputShape
from flexheads.heads.losses import ANY_NUMBER, IGNORED
from flexheads.heads.outputs import head_output
from flexheads.heads.pooling import real_positions
from flexheads.heads.source import Source
from flexheads.heads.tagging import check_token_labels
from flexheads.heads.text import RowText


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DetectionConfig(FeedForwardConfig):
    """Configuration of `DetectionHead`.

    Attributes:
        threshold: The probability from which a token counts as replaced.
    """

    layers: int = 2
    activation_function: str | None = "gelu"
    threshold: float = 0.5


class DetectionHead(FeedForwardHead):
    """Tells replaced tokens from those of the text (arXiv:2003.10555, section 2).

    Logits are ``(batch, sequence)``, above 0 where a token is rather a replaced one.
    """

    head_type = "detection"
    config_class = DetectionConfig
    samples: ClassVar[Samples] = Texts("join", offsets=True)

    @property
    def num_outputs(self) -> int:
        return 1

    @property
    def losses(self) -> tuple[str, ...]:
        return ANY_NUMBER

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        given = labels.get("labels")
        if isinstance(given, Tensor) and given.dtype == torch.bool:
            given = given.long()
        if given is not None:
            check_token_labels(f"labels of head {self.name!r}", given, 2, shape)

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; ``labels`` is ``(batch, sequence)``.

        It is 1 or True where a token was replaced. -100 does not count, nor does padding.
        """
        scores, given, loss = scores.squeeze(-1), labels.get("labels"), None
        if given is not None:
            counted, real = given != IGNORED, real_positions(features)
            counted = counted if real is None else counted & real
            loss = self.loss(scores[counted], given[counted])
        return head_output(TokenClassifierOutput, features.output, loss=loss, logits=scores)

    def decode(  # type: ignore[override]  # its own options
        self,
        output: Any,
        source: Source | None = None,
        *,
        threshold: float | None = None,
    ) -> list[Any]:
        """The tokens of each row that count as replaced.

        Args:
            output: What `forward` returned.
            source: The inputs, with texts and offsets.
            threshold: The probability from which one does; None is the configured one.

        Returns:
            For each row a list of ``{"score", "index", "word", "start", "end"}``: the probability,
            the position, and the place in characters of the text.

        Raises:
            UnsupportedError: If the source lacks what is needed.
        """
        least = self.config.threshold if threshold is None else threshold
        rows = []
        for row, scores in enumerate(output.logits.detach().float().sigmoid().tolist()):
            text = RowText(source, row, f"Decoding head {self.name!r}")
            rows.append(
                [
                    {"score": scores[t.index], "index": t.index}
                    | text.piece(t.part, t.start, t.end)
                    for t in text.tokens
                    if scores[t.index] >= least
                ]
            )
        return rows
