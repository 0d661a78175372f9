"""``add_*_head``: heads that score or embed a whole sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexheads.errors import LabelError
from flexheads.heads.config import label_names
from flexheads.models.heads.methods import HeadsMixin


class AddSequenceHeadsMixin(HeadsMixin):
    """One method for each type; `flexheads.models.heads.add.AddHeadsMixin` says what they share."""

    def add_regression_head(
        self,
        head_name: str,
        targets: int | Sequence[str] = 1,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        use_pooler: bool = False,
        dropout_prob: float | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds regression of the `targets`, their names or how many; `mean` and `std` of each.

        Given those, the head is trained on standardised values; logits and labels have units.
        """
        self.add_head(
            head_name,
            "regression",
            overwrite_ok,
            set_active,
            **_named(targets, "targets"),
            layers=layers,
            activation_function=activation_function,
            mean=mean,
            std=std,
            use_pooler=use_pooler,
            dropout_prob=dropout_prob,
            **further,
        )

    def add_ordinal_head(
        self,
        head_name: str,
        levels: int | Sequence[str],
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        use_pooler: bool = False,
        dropout_prob: float | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds ordinal regression (CORAL); `levels` are names from low to high, or how many."""
        self.add_head(
            head_name,
            "ordinal",
            overwrite_ok,
            set_active,
            **_named(levels, "levels"),
            layers=layers,
            activation_function=activation_function,
            use_pooler=use_pooler,
            dropout_prob=dropout_prob,
            **further,
        )

    def add_embedding_head(
        self,
        head_name: str,
        embedding_size: int | None = None,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        pooling: str | None = "mean",
        normalise: bool = True,
        loss: str | Mapping[str, Any] | None = None,
        dropout_prob: float | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds embeddings: the pooled vector, projected where `embedding_size` says to what size.

        `loss` is ``"contrastive"`` (None), ``"multiple_negatives_ranking"``, ``"triplet"``,
        ``"cosine_similarity"`` or ``"cosine_embedding"``.
        """
        self.add_head(
            head_name,
            "embedding",
            overwrite_ok,
            set_active,
            embedding_size=embedding_size,
            layers=layers,
            activation_function=activation_function,
            pooling=pooling,
            normalise=normalise,
            loss=loss,
            dropout_prob=dropout_prob,
            **further,
        )

    def add_ranking_head(
        self,
        head_name: str,
        num_choices: int | None = None,
        layers: int = 1,
        activation_function: str | None = "tanh",
        overwrite_ok: bool = False,
        use_pooler: bool = False,
        bias: bool = True,
        loss: str | Mapping[str, Any] | None = None,
        dropout_prob: float | None = None,
        set_active: bool = True,
        **further: Any,
    ) -> None:
        """Adds a score, as of a reward model; `num_choices` counts for groups that come flat.

        `loss` is ``"bradley_terry"`` (None), with its margin, or ``"listwise"``.
        """
        self.add_head(
            head_name,
            "ranking",
            overwrite_ok,
            set_active,
            num_choices=num_choices,
            layers=layers,
            activation_function=activation_function,
            use_pooler=use_pooler,
            bias=bias,
            loss=loss,
            dropout_prob=dropout_prob,
            **further,
        )


def _named(names: int | Sequence[str], what: str) -> dict[str, Any]:
    """Number and names of labels from either.

    Raises:
        LabelError: If two share a name, or they are neither.
    """
    if isinstance(names, int):
        return label_names(names, None)
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise LabelError(f"{what}={names!r} should be a list of names, or how many there are.")
    return label_names(None, dict(enumerate(names)))
