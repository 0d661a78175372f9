"""``add_*_head``: heads for sound and images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexheads.heads.config import label_names
from flexheads.models.heads.methods import HeadsMixin


class AddMediaHeadsMixin(HeadsMixin):
    """One method for each type; `flexheads.models.heads.add.AddHeadsMixin` says what they share."""

    def add_audio_classification_head(
        self,
        head_name: str,
        num_labels: int | None = None,
        layers: int = 2,
        activation_function: str | None = None,
        overwrite_ok: bool = False,
        id2label: Mapping[int, str] | None = None,
        projection_size: int | None = None,
        dropout_prob: float | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds classification of sounds; `projection_size` is the size between the layers."""
        self.add_head(
            head_name,
            "audio_classification",
            overwrite_ok,
            set_active,
            **label_names(num_labels, id2label),
            layers=layers,
            activation_function=activation_function,
            projection_size=projection_size,
            dropout_prob=dropout_prob,
            **further,
        )

    def add_audio_frame_classification_head(
        self,
        head_name: str,
        num_labels: int | None = None,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        id2label: Mapping[int, str] | None = None,
        dropout_prob: float | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds classification of each frame of a sound."""
        self.add_head(
            head_name,
            "audio_frame_classification",
            overwrite_ok,
            set_active,
            **label_names(num_labels, id2label),
            layers=layers,
            activation_function=activation_function,
            dropout_prob=dropout_prob,
            **further,
        )

    def add_ctc_head(
        self,
        head_name: str,
        vocab_size: int | None = None,
        blank: int | None = None,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        dropout_prob: float | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds text from sound; `blank` is the number of the token that stands for none."""
        self.add_head(
            head_name,
            "ctc",
            overwrite_ok,
            set_active,
            vocab_size=vocab_size,
            blank=blank,
            layers=layers,
            activation_function=activation_function,
            dropout_prob=dropout_prob,
            **further,
        )

    def add_xvector_head(
        self,
        head_name: str,
        num_labels: int | None = None,
        embedding_size: int = 512,
        overwrite_ok: bool = False,
        id2label: Mapping[int, str] | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds vectors of voices; the labels are the speakers that they are trained on."""
        names = label_names(num_labels, id2label)
        config = {**names, "embedding_size": embedding_size, **further}
        self.add_head(head_name, "xvector", overwrite_ok, set_active, **config)

    def add_masked_image_modeling_head(
        self,
        head_name: str,
        stride: int | None = None,
        overwrite_ok: bool = False,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds the pixels of images; `stride` is the size of a patch that one position draws."""
        config = {"stride": stride, **further}
        self.add_head(head_name, "masked_image_modeling", overwrite_ok, set_active, **config)

    def add_masked_image_tokens_head(
        self,
        head_name: str,
        vocab_size: int | None = None,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds the visual tokens of images, of a codebook of size `vocab_size`."""
        config: dict[str, Any] = {"vocab_size": vocab_size, "layers": layers}
        config |= {"activation_function": activation_function, **further}
        self.add_head(head_name, "masked_image_tokens", overwrite_ok, set_active, **config)
