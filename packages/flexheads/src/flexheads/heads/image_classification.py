"""Image classification and regression."""

from __future__ import annotations

import dataclasses

from transformers.modeling_outputs import ImageClassifierOutput

from flexheads.heads.classification import ClassificationConfig, ClassificationHead


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ImageClassificationConfig(ClassificationConfig):
    """Configuration of `ImageClassificationHead`.

    Attributes:
        multilabel: Whether any number of labels holds at once.
    """

    layers: int = 1
    multilabel: bool = False


class ImageClassificationHead(ClassificationHead):
    """Classifies an image; regression for one label. Logits are ``(batch, num_labels)``."""

    head_type = "image_classification"
    needs = "pixels"
    config_class = ImageClassificationConfig
    output_class = ImageClassifierOutput

    @property
    def problem_type(self) -> str:
        """The kind of loss; one output is regression whatever else is set."""
        if self.config.multilabel and self.config.num_labels > 1:
            return "multi_label_classification"
        return super().problem_type
