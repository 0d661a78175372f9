"""Classification of each frame of a sound, such as who speaks when."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import TokenClassifierOutput

from flexheads.heads.base import FeedForwardHead
from flexheads.heads.config import LabelledConfig
from flexheads.heads.features import Features
from flexheads.heads.frames import OfFrames, with_lengths
from flexheads.heads.labels import InputShape, check_indices, check_shares
from flexheads.heads.losses import ANY_NUMBER, IGNORED, ONE_OF_MANY
from flexheads.heads.outputs import head_output
from flexheads.heads.pooling import real_positions
from flexheads.heads.source import Source


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AudioFrameClassificationConfig(LabelledConfig):
    """Configuration of `AudioFrameClassificationHead`.

    Attributes:
        threshold: Where any number of labels can hold at once, because the loss is one of those,
            the probability from which one does.
    """

    threshold: float = 0.5


@dataclasses.dataclass
class FrameClassifierOutput(OfFrames, TokenClassifierOutput):
    """Scores of frames: ``logits`` ``(batch, frames, num_labels)``, and a ``loss``."""


class AudioFrameClassificationHead(FeedForwardHead):
    """Classifies every frame. Logits are ``(batch, frames, num_labels)``.

    With ``loss="binary_cross_entropy"`` any number of labels holds at once, as where people speak
    at the same time; otherwise one does.
    """

    head_type = "audio_frame_classification"
    needs = "sound"
    config_class = AudioFrameClassificationConfig

    @property
    def losses(self) -> tuple[str, ...]:
        return (*ONE_OF_MANY, *ANY_NUMBER)

    @property
    def multilabel(self) -> bool:
        """Whether any number of labels holds at once."""
        loss = self.config.loss
        return (loss if isinstance(loss, str) else dict(loss or {}).get("type")) in ANY_NUMBER

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        if (given := labels.get("labels")) is None:
            return
        where, count = f"labels of head {self.name!r}", self.config.num_labels
        if self.multilabel or (isinstance(given, Tensor) and given.dim() == 3):
            check_shares(where, given, [(shape.rows, None, count)])
        else:
            check_indices(where, given, count, [(shape.rows, None)])

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; frames that are padding do not count.

        ``labels`` is ``(batch, frames)``, or ``(batch, frames, num_labels)`` with a one for each
        label that holds; where only one can, that is the first of the largest.
        """
        given, loss = labels.get("labels"), None
        if given is not None:
            loss = self._frame_loss(scores, given, real_positions(features))
        output = head_output(FrameClassifierOutput, features.output, loss=loss, logits=scores)
        return with_lengths(output, features)

    def _frame_loss(self, scores: Tensor, labels: Tensor, real: Tensor | None) -> Tensor:
        if self.multilabel:
            return (
                self.loss(scores, labels) if real is None else self.loss(scores[real], labels[real])
            )
        if labels.dim() == 3:
            labels = labels.argmax(dim=-1)
        return self.loss(scores, labels if real is None else labels.masked_fill(~real, IGNORED))

    def decode(self, output: Any, source: Source | None = None, **options: Any) -> list[Any]:
        """Which label holds from which frame to which, of each row.

        Args:
            output: What `forward` returned.
            source: Not needed.
            options: None.

        Returns:
            For each row a list of ``{"label", "score", "start", "end"}``: frames, the end not
            included, and the mean probability.
        """
        probabilities = output.logits.sigmoid() if self.multilabel else output.logits.softmax(-1)
        return [
            self._segments(row[: output.frames_of(number)])
            for number, row in enumerate(probabilities)
        ]

    def _segments(self, probabilities: Tensor) -> list[dict[str, Any]]:
        """The segments of one row, in the order in which they start."""
        if self.multilabel:
            holds = probabilities >= self.config.threshold
        else:
            best = probabilities.argmax(dim=-1)
            holds = torch.nn.functional.one_hot(best, probabilities.shape[-1]).bool()
        found = []
        for number, label in self.config.id2label.items():
            for start, end in _runs(holds[:, number]):
                score = float(probabilities[start:end, number].mean().detach())
                found.append({"label": label, "score": score, "start": start, "end": end})
        return sorted(found, key=lambda segment: (segment["start"], segment["end"]))


def _runs(holds: Tensor) -> list[tuple[int, int]]:
    """Where marked positions begin and end, ``(start, end)``, the end not included."""
    edges = torch.nn.functional.pad(holds.int(), (1, 1)).diff()
    starts, ends = (edges == 1).nonzero(), (edges == -1).nonzero()
    return [(int(s), int(e)) for s, e in zip(starts, ends, strict=True)]
