"""``add_*_head``: the built-in types under the names and signatures that users know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexheads.heads.config import label_names
from flexheads.models.heads.add_media import AddMediaHeadsMixin
from flexheads.models.heads.add_sequence import AddSequenceHeadsMixin
from flexheads.models.heads.add_token import AddTokenHeadsMixin
from flexheads.models.heads.custom import CustomHeadsMixin


class AddHeadsMixin(
    AddSequenceHeadsMixin, AddTokenHeadsMixin, AddMediaHeadsMixin, CustomHeadsMixin
):
    """One method for each built-in head type; `add_head` serves every installed one.

    They share these arguments: `head_name` (any string), `num_labels` (None takes it from
    `id2label`, or else 2), `layers`, `activation_function` (between layers, or None),
    `overwrite_ok` (replace a head of that name), `id2label` (names of the labels by number),
    `use_pooler` (read the trained pooler), `bias` (of the last layer) and `dropout_prob` (None is
    the model's own). The new head becomes the active one unless `set_active` is false. `further`
    are more fields of the type's configuration, such as `pooling`, `hidden_layer`, `layer_norm`
    and `loss`; see `flexheads.heads.config`.

    All raise `ConfigError` for a name that is taken or a value that cannot be, and `LabelError`
    for label names that contradict `num_labels`.
    """

    def add_classification_head(
        self,
        head_name: str,
        num_labels: int | None = None,
        layers: int = 2,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        multilabel: bool = False,
        id2label: Mapping[int, str] | None = None,
        use_pooler: bool = False,
        bias: bool = True,
        dropout_prob: float | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds sequence classification; one label is regression, `multilabel` is any number."""
        self.add_head(
            head_name,
            "multilabel_classification" if multilabel else "classification",
            overwrite_ok,
            set_active,
            **label_names(num_labels, id2label),
            layers=layers,
            activation_function=activation_function,
            use_pooler=use_pooler,
            bias=bias,
            dropout_prob=dropout_prob,
            **further,
        )

    def add_multiple_choice_head(
        self,
        head_name: str,
        num_choices: int | None = 2,
        layers: int = 2,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        id2label: Mapping[int, str] | None = None,
        use_pooler: bool = False,
        dropout_prob: float | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds multiple choice; `num_choices` counts for inputs that come flat."""
        named = num_choices is not None or id2label is not None
        names = label_names(num_choices, id2label, "num_choices")["label2id"] if named else None
        self.add_head(
            head_name,
            "multiple_choice",
            overwrite_ok,
            set_active,
            num_choices=num_choices,
            label2id=names,
            layers=layers,
            activation_function=activation_function,
            use_pooler=use_pooler,
            dropout_prob=dropout_prob,
            **further,
        )

    def add_tagging_head(
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
        """Adds token classification."""
        config = label_names(num_labels, id2label)
        config |= {"layers": layers, "activation_function": activation_function}
        config |= {"dropout_prob": dropout_prob, **further}
        self.add_head(head_name, "tagging", overwrite_ok, set_active, **config)

    def add_qa_head(
        self,
        head_name: str,
        num_labels: int = 2,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        id2label: Mapping[int, str] | None = None,
        dropout_prob: float | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds extractive question answering; the two outputs are start and end."""
        config = label_names(num_labels, id2label)
        config |= {"layers": layers, "activation_function": activation_function}
        config |= {"dropout_prob": dropout_prob, **further}
        self.add_head(head_name, "question_answering", overwrite_ok, set_active, **config)

    def add_masked_lm_head(
        self,
        head_name: str,
        activation_function: str | None = "gelu",
        layers: int = 2,
        overwrite_ok: bool = False,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds masked language modelling, on the model's own embeddings where those are tied."""
        self._add_lm_head(
            head_name, "masked_lm", activation_function, layers, overwrite_ok, set_active, further
        )

    def add_causal_lm_head(
        self,
        head_name: str,
        activation_function: str | None = "gelu",
        layers: int = 2,
        overwrite_ok: bool = False,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds causal language modelling, on the model's own embeddings where those are tied."""
        self._add_lm_head(
            head_name, "causal_lm", activation_function, layers, overwrite_ok, set_active, further
        )

    def add_seq2seq_lm_head(
        self,
        head_name: str,
        layers: int = 1,
        overwrite_ok: bool = False,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds language modelling on a decoder, on the model's embeddings where those are tied."""
        self.add_head(head_name, "seq2seq_lm", overwrite_ok, set_active, layers=layers, **further)

    def add_image_classification_head(
        self,
        head_name: str,
        num_labels: int | None = None,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        multilabel: bool = False,
        id2label: Mapping[int, str] | None = None,
        use_pooler: bool = False,
        bias: bool = True,
        dropout_prob: float | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds image classification; one label is regression, `multilabel` is any number."""
        self.add_head(
            head_name,
            "image_classification",
            overwrite_ok,
            set_active,
            **label_names(num_labels, id2label),
            layers=layers,
            activation_function=activation_function,
            multilabel=multilabel,
            use_pooler=use_pooler,
            bias=bias,
            dropout_prob=dropout_prob,
            **further,
        )

    def _add_lm_head(
        self,
        head_name: str,
        head_type: str,
        activation_function: str | None,
        layers: int,
        overwrite_ok: bool,
        set_active: bool,
        further: Mapping[str, Any],
    ) -> None:
        fields: dict[str, Any] = {"activation_function": activation_function, "layers": layers}
        fields |= further
        self.add_head(head_name, head_type, overwrite_ok, set_active, **fields)
