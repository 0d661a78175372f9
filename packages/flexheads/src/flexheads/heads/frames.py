"""Frames of sound: which are real, kept beside the scores for decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexheads.heads.features import Features
from flexheads.heads.pooling import real_positions


class OfFrames:
    """An output whose rows are frames of sound, of which the last may be padding.

    Attributes:
        lengths: Real frames of each row, ``(batch,)``, or None where nothing tells. It is no item
            of the output, so that trainers do not gather it.
    """

    lengths: Tensor | None = None

    def frames_of(self, row: int) -> int | None:
        """Real frames of a row; None is all."""
        return None if self.lengths is None else int(self.lengths[row])


def frame_lengths(features: Features) -> Tensor:
    """Real frames of each row, ``(batch,)``."""
    real, hidden = real_positions(features), features.hidden
    if real is None:
        return torch.full(hidden.shape[:1], hidden.shape[1], device=hidden.device)
    return real.sum(dim=-1)


def with_lengths(output: Any, features: Features) -> Any:
    """An output of frames that knows how many of them are real."""
    output.lengths = frame_lengths(features)
    return output
