"""``add_*_head``: heads that read tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexheads.heads.config import label_names
from flexheads.models.heads.methods import HeadsMixin


class AddTokenHeadsMixin(HeadsMixin):
    """One method for each type; `flexheads.models.heads.add.AddHeadsMixin` says what they share."""

    def add_dependency_parsing_head(
        self,
        head_name: str,
        num_labels: int | None = None,
        overwrite_ok: bool = False,
        id2label: Mapping[int, str] | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds dependency parsing; the labels are the relations, and forward gets `word_starts`."""
        config = label_names(num_labels, id2label) | further
        self.add_head(head_name, "dependency_parsing", overwrite_ok, set_active, **config)

    def add_span_classification_head(
        self,
        head_name: str,
        num_labels: int | None = None,
        layers: int = 2,
        activation_function: str | None = "relu",
        overwrite_ok: bool = False,
        id2label: Mapping[int, str] | None = None,
        max_width: int = 8,
        dropout_prob: float | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds classification of the spans that forward gets, or of all up to `max_width` tokens.

        The label of a span that is none is named ``"O"``.
        """
        config = label_names(num_labels, id2label)
        config |= {"layers": layers, "activation_function": activation_function}
        config |= {"max_width": max_width, "dropout_prob": dropout_prob, **further}
        self.add_head(head_name, "span_classification", overwrite_ok, set_active, **config)

    def add_detection_head(
        self,
        head_name: str,
        layers: int = 2,
        activation_function: str | None = "gelu",
        overwrite_ok: bool = False,
        dropout_prob: float | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds the detection of replaced tokens, as discriminators are trained for."""
        config: dict[str, Any] = {"layers": layers, "activation_function": activation_function}
        config |= {"dropout_prob": dropout_prob, **further}
        self.add_head(head_name, "detection", overwrite_ok, set_active, **config)
