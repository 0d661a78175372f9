"""Losses over rows that belong together: embeddings of a batch, and choices of one group."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def contrastive(embeddings: Tensor, labels: Tensor, *, temperature: float = 0.05) -> Tensor:
    """Supervised contrastive loss (arXiv:2004.11362, L_out); InfoNCE over all other rows.

    Rows of one label attract each other, all others are negatives; with two rows of each label it
    is NT-Xent (arXiv:2002.05709, equation 1). Rows that are alone with their label are negatives.

    Args:
        embeddings: ``(rows, size)``; their cosines count.
        labels: ``(rows,)``, ids of pairs or classes.
        temperature: What the cosines are divided by.
    """
    itself = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    scores = _cosines(embeddings, embeddings) / temperature
    scores = scores.masked_fill(itself, torch.finfo(scores.dtype).min)
    same = _same(labels) & ~itself
    shares = functional.log_softmax(scores, dim=-1).masked_fill(~same, 0.0).sum(-1)
    partners = same.sum(-1)
    return -_mean(shares / partners.clamp(min=1), partners > 0)


def multiple_negatives_ranking(
    embeddings: Tensor, labels: Tensor, *, temperature: float = 0.05, symmetric: bool = False
) -> Tensor:
    """The first row of each pair finds the second among the second rows of all pairs.

    InfoNCE with the negatives of the batch (arXiv:1705.00652, arXiv:1807.03748).

    Args:
        embeddings: ``(rows, size)``; their cosines count.
        labels: ``(rows,)``, ids of pairs; each is there twice.
        temperature: What the cosines are divided by.
        symmetric: Whether the second row also has to find the first; the mean of both ways.
    """
    order = labels.argsort(stable=True)
    scores = _cosines(embeddings[order[0::2]], embeddings[order[1::2]]) / temperature
    right = torch.arange(len(scores), device=scores.device)
    loss = functional.cross_entropy(scores, right)
    return (loss + functional.cross_entropy(scores.T, right)) / 2 if symmetric else loss


def cosine_similarity(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error of the cosine of each two rows (arXiv:1908.10084, section 3).

    Args:
        embeddings: ``(2 * pairs, size)``; rows ``2i`` and ``2i + 1`` are a pair.
        labels: ``(pairs,)``, how similar each pair is, from -1 to 1.
    """
    one, other = embeddings[0::2], embeddings[1::2]
    return functional.mse_loss(functional.cosine_similarity(one, other), labels.to(one.dtype))


def cosine_embedding(embeddings: Tensor, labels: Tensor, *, margin: float = 0.0) -> Tensor:
    """Torch's ``CosineEmbeddingLoss``: pairs are alike (1), or not (-1).

    Args:
        embeddings: ``(2 * pairs, size)``; rows ``2i`` and ``2i + 1`` are a pair.
        labels: ``(pairs,)``, each 1 or -1.
        margin: The cosine below which a pair that is not alike costs nothing.
    """
    one, other = embeddings[0::2], embeddings[1::2]
    return functional.cosine_embedding_loss(one, other, labels, margin=margin)


def triplet(
    embeddings: Tensor, labels: Tensor, *, margin: float = 1.0, hard: bool = False
) -> Tensor:
    """Triplet loss over the batch with Euclidean distances (arXiv:1703.07737, L_BA and L_BH).

    Args:
        embeddings: ``(rows, size)``.
        labels: ``(rows,)``, ids of classes.
        margin: By how much a row of another class shall be farther away than one of the same.
        hard: Only the farthest of the same class and the nearest of the others count for each
            row, in place of all triplets.
    """
    mode = "donot_use_mm_for_euclid_dist"  # the other one is not exact for near rows
    distances = torch.cdist(embeddings, embeddings, compute_mode=mode)
    itself = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    same, other = _same(labels) & ~itself, ~_same(labels)
    if hard:
        farthest = distances.masked_fill(~same, 0.0).amax(-1)
        nearest = distances.masked_fill(~other, torch.finfo(distances.dtype).max).amin(-1)
        losses, counted = farthest - nearest + margin, same.any(-1) & other.any(-1)
    else:
        losses = distances.unsqueeze(2) - distances.unsqueeze(1) + margin
        counted = same.unsqueeze(2) & other.unsqueeze(1)
    return _mean(losses.clamp(min=0.0), counted)


def bradley_terry(scores: Tensor, labels: Tensor, *, margin: float = 0.0) -> Tensor:
    """Bradley-Terry loss of every two choices of which one is better (arXiv:2203.02155, 1).

    ``-log sigmoid(better - worse - margin * difference)``, the mean over all such two.

    Args:
        scores: ``(groups, choices)``.
        labels: ``(groups,)``, the number of the best choice, which is better by 1 than all others,
            or -100 where none is; or ``(groups, choices)``, how good each is.
        margin: How much higher a choice shall score that is better by 1 (arXiv:2307.09288, 2).
    """
    grades = labels
    if labels.dim() == 1:
        numbers = torch.arange(scores.shape[-1], device=scores.device)
        grades = labels.unsqueeze(-1) == numbers
    grades = grades.to(scores.dtype)
    better = grades.unsqueeze(-1) - grades.unsqueeze(-2)
    lead = scores.unsqueeze(-1) - scores.unsqueeze(-2)
    return _mean(-functional.logsigmoid(lead - margin * better), better > 0)


def listwise(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of who is best (ListNet with top one, Cao et al., ICML 2007).

    Args:
        scores: ``(groups, choices)``.
        labels: ``(groups,)``, the number of the best choice, or -100 where none is; or
            ``(groups, choices)``, how good each is, of which the softmax is the target.
    """
    if labels.dim() == 1:
        return _mean(
            functional.cross_entropy(scores, labels, reduction="none", ignore_index=-100),
            labels >= 0,
        )
    return functional.cross_entropy(scores, labels.to(scores.dtype).softmax(-1))


def _cosines(one: Tensor, other: Tensor) -> Tensor:
    return functional.normalize(one, dim=-1) @ functional.normalize(other, dim=-1).T


def _same(labels: Tensor) -> Tensor:
    return labels.unsqueeze(0) == labels.unsqueeze(1)


def _mean(losses: Tensor, counted: Tensor) -> Tensor:
    """The mean of those that count; 0 where none does."""
    return losses.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
