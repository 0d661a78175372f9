"""A head that gives every token a vector, and compares texts by the sum of best matches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils.generic import ModelOutput

from flexheads.errors import ConfigError
from flexheads.heads import (
    Features,
    FeedForwardConfig,
    FeedForwardHead,
    InputShape,
    Source,
    check_indices,
    head_output,
    real_positions,
)


@dataclasses.dataclass
class LateInteractionOutput(ModelOutput):
    """What `LateInteractionHead` gives.

    Attributes:
        loss: The contrastive loss, where labels were given.
        token_embeddings: ``(batch, sequence, size)``, of length 1; zero at padding.
        hidden_states: As the backbone gives them.
        attentions: As the backbone gives them.
    """

    loss: Tensor | None = None
    token_embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LateInteractionConfig(FeedForwardConfig):
    """Configuration of `LateInteractionHead`.

    Attributes:
        size: Size of a token's vector.
        temperature: What similarities are divided by in the loss.
    """

    size: int = 128
    temperature: float = 1.0
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.size) is not int or self.size < 1:
            raise ConfigError(f"size={self.size!r} should be a whole number, at least 1.")
        if type(self.temperature) not in (int, float) or self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature!r} should be a number above 0.")
        if self.loss is not None:
            raise ConfigError("The loss of late interaction is no choice; leave loss out.")


class LateInteractionHead(FeedForwardHead):
    """ColBERT (arXiv:2004.12832, section 3): a vector of length 1 for every token.

    Training contrasts the texts of one batch: ``labels``, ``(batch,)``, number what belongs
    together. The first row with a number is a query, and the others with that number are its
    documents; every document of the batch competes for every query.
    """

    head_type = "late_interaction"
    config_class = LateInteractionConfig

    @property
    def num_outputs(self) -> int:
        return int(self.config.size)

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        if (given := labels.get("labels")) is not None:
            where = f"labels of head {self.name!r}"
            check_indices(where, given, torch.iinfo(torch.int64).max, [(shape.rows,)])

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; ``labels`` is ``(batch,)``, see `LateInteractionHead`."""
        vectors = functional.normalize(scores, dim=-1)
        real = real_positions(features)
        if real is not None:
            vectors = vectors * real.unsqueeze(-1)
        given = labels.get("labels")
        loss = None if given is None else self.contrast(vectors, real, given)
        return head_output(
            LateInteractionOutput, features.output, loss=loss, token_embeddings=vectors
        )

    def tiny_labels(self, shape: InputShape, generator: torch.Generator) -> dict[str, Tensor]:
        """Labels for tests: every two rows belong together."""
        return {"labels": torch.arange(shape.rows) // 2}

    def contrast(self, vectors: Tensor, real: Tensor | None, labels: Tensor) -> Tensor:
        """Cross-entropy of every document under its query, over all documents of the batch.

        Args:
            vectors: ``(batch, sequence, size)``.
            real: Which positions are no padding, ``(batch, sequence)``; None is all.
            labels: ``(batch,)``.
        """
        rows = torch.arange(len(labels), device=labels.device)
        same = labels.unsqueeze(0) == labels.unsqueeze(1)
        first = same.to(torch.uint8).argmax(dim=1)  # the first row of the same number
        documents = rows[(rows != first) & (labels >= 0)]
        if not len(documents):
            return vectors.sum() * 0.0
        queries, owner = first[documents].unique(return_inverse=True)
        scores = max_sim(
            vectors[queries], vectors[documents], None if real is None else real[documents]
        )
        scores = scores[owner] / self.config.temperature
        # Other documents of the same query are no mistakes.
        siblings = owner.unsqueeze(0) == owner.unsqueeze(1)
        own = torch.eye(len(documents), dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(siblings & ~own, torch.finfo(scores.dtype).min)
        return functional.cross_entropy(scores, torch.arange(len(documents), device=scores.device))

    def decode(self, output: Any, source: Source | None = None, **options: Any) -> list[Any]:
        """The vectors of every text's tokens, without padding: lists of lists of numbers."""
        vectors: Tensor = output.token_embeddings.detach().cpu()
        mask = None if source is None else source.attention_mask
        kept = torch.ones(vectors.shape[:2]) if mask is None else mask.cpu()
        return [row[use != 0].tolist() for row, use in zip(vectors, kept, strict=True)]


def max_sim(queries: Tensor, documents: Tensor, real: Tensor | None = None) -> Tensor:
    """How well documents answer queries: for every query token its best match, summed.

    Args:
        queries: ``(queries, query tokens, size)``; padding is zero.
        documents: ``(documents, document tokens, size)``.
        real: Which document tokens count, ``(documents, document tokens)``; None is all.

    Returns:
        ``(queries, documents)``.
    """
    similar = torch.einsum("qis,djs->qdij", queries, documents)
    if real is not None:
        similar = similar.masked_fill(
            ~real.bool()[None, :, None, :], torch.finfo(similar.dtype).min
        )
    best = similar.amax(dim=-1)
    counted = queries.abs().amax(dim=-1) > 0
    return (best * counted.unsqueeze(1)).sum(dim=-1)
