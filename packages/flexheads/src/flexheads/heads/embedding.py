"""Embeddings: one vector for a sequence, trained by what shall be near to what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils.generic import ModelOutput

from flexheads.errors import ConfigError, LabelError
from flexheads.heads.base import PooledHead
from flexheads.heads.config import PooledConfig
from flexheads.heads.features import Features
from flexheads.heads.labels import InputShape, check_indices, check_numbers
from flexheads.heads.losses import loss_name
from flexheads.heads.outputs import head_output
from flexheads.heads.source import Source

_BY_PAIR = ("cosine_similarity", "cosine_embedding")
_ANY_ID = torch.iinfo(torch.int64).max


@dataclasses.dataclass
class EmbeddingOutput(ModelOutput):
    """What an `EmbeddingHead` gives.

    Attributes:
        loss: The loss, where labels were given.
        embeddings: ``(batch, size)``.
        hidden_states: The backbone's hidden states, where they were asked for.
        attentions: Its attentions, where they were asked for.
    """

    loss: Tensor | None = None
    embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class EmbeddingConfig(PooledConfig):
    """Configuration of `EmbeddingHead`.

    Attributes:
        pooling: What stands for the sequence; None is the architecture's own.
        embedding_size: Size of the embeddings, which the last layer gives; None for no layers at
            all: the embedding is the pooled vector.
        layers: Number of linear layers, where there are any.
        normalise: Whether embeddings have length 1.
    """

    pooling: str | None = "mean"
    embedding_size: int | None = None
    normalise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.embedding_size
        if size is not None and (type(size) is not int or size < 1):
            raise ConfigError(f"embedding_size={size!r} should be a whole number, at least 1.")
        if not isinstance(self.normalise, bool):
            raise ConfigError(f"normalise={self.normalise!r} should be True or False.")
        if size is None and self.layers > 1:
            raise ConfigError(f"layers={self.layers} needs embedding_size, the size of the last.")


class EmbeddingHead(PooledHead):
    """Embeds a sequence; see `EmbeddingOutput`.

    Its losses and their labels:

    - ``contrastive``, ``triplet``: ids of classes or pairs, ``(rows,)``;
    - ``multiple_negatives_ranking``: ids of pairs, ``(rows,)``, each there twice;
    - ``cosine_similarity``, ``cosine_embedding``: of each two rows, ``(rows / 2,)``, how similar
      they are or whether (1 or -1). Inputs ``(batch, 2, sequence)`` are such rows.
    """

    head_type = "embedding"
    config_class: ClassVar[type[EmbeddingConfig]] = EmbeddingConfig

    @property
    def losses(self) -> tuple[str, ...]:
        return ("contrastive", "multiple_negatives_ranking", "triplet", *_BY_PAIR)

    @property
    def num_outputs(self) -> int:
        return int(self.config.embedding_size or self.hidden_size * self.width)

    @property
    def sizes(self) -> list[int]:
        return super().sizes if self.config.embedding_size else [self.num_outputs]

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        if (given := labels.get("labels")) is None:
            return
        where, rows = f"labels of head {self.name!r}", shape.rows
        kind = loss_name(self.config.loss, self.losses)
        if kind in _BY_PAIR:
            if rows % 2:
                raise LabelError(
                    f"{where} are for pairs of rows, but the input has {rows} rows. Give "
                    "(batch, 2, sequence), or each pair one row after the other."
                )
            check_numbers(where, given, [(rows // 2,)])
            _check_similarities(where, given, kind == "cosine_embedding")
            return
        check_indices(where, given, _ANY_ID, [(rows,)])
        if kind == "multiple_negatives_ranking":
            _check_pairs(where, given)

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> EmbeddingOutput:
        """See `FeedForwardHead.finish`; for ``labels`` see the class."""
        embeddings = functional.normalize(scores, dim=-1) if self.config.normalise else scores
        given = labels.get("labels")
        loss = None if given is None else self.loss(embeddings, given)
        output: EmbeddingOutput = head_output(
            EmbeddingOutput, features.output, loss=loss, embeddings=embeddings
        )
        return output

    def decode(
        self, output: Any, source: Source | None = None, **options: Any
    ) -> list[list[float]]:
        """The embedding of each row, a list of numbers."""
        found: list[list[float]] = output.embeddings.float().tolist()
        return found


def _check_similarities(where: str, labels: Tensor, only_ends: bool) -> None:
    if torch.compiler.is_compiling() or not labels.numel():
        return
    wrong = labels[(labels.abs() != 1) if only_ends else (labels.abs() > 1)]
    if wrong.numel():
        wanted = "each is 1 or -1" if only_ends else "each is from -1 to 1"
        raise LabelError(f"{where} hold {float(wrong[0]):g}; {wanted}.")


def _check_pairs(where: str, labels: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    ids, counts = labels.unique(return_counts=True)  # type: ignore[no-untyped-call]
    if bool((counts != 2).any()):
        which = counts != 2
        raise LabelError(
            f"{where} are ids of pairs, but id {int(ids[which][0])} is there "
            f"{int(counts[which][0])} times; each is there twice."
        )
