"""Classification of sounds."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from flexheads.heads.classification import ClassificationConfig, ClassificationHead


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class AudioClassificationConfig(ClassificationConfig):
    """Configuration of `AudioClassificationHead`.

    Attributes:
        pooling: What stands for the sound; the mean over its frames.
        activation_function: Activation between the layers; without one they are a projection and a
            classifier, as in SUPERB (arXiv:2105.01051, section 3).
        projection_size: Size between the layers; None is the hidden size.
    """

    pooling: str | None = "mean"
    activation_function: str | None = None
    projection_size: int | None = None


class AudioClassificationHead(ClassificationHead):
    """Classifies a sound; regression for one label. Logits are ``(batch, num_labels)``."""

    head_type = "audio_classification"
    needs = "sound"
    config_class: ClassVar[type[AudioClassificationConfig]] = AudioClassificationConfig

    @property
    def sizes(self) -> list[int]:
        first, *between, last = super().sizes
        size = self.config.projection_size or self.hidden_size
        return [first, *(size for _ in between), last]
