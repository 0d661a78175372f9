"""Losses that are a choice: named in a head's configuration, and so saved with the head."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flexheads.errors import ConfigError, UnknownNameError
from flexheads.heads import row_losses

IGNORED = -100
"""The label that does not count."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""A mean loss of scores and labels."""


def cross_entropy(
    scores: Tensor,
    labels: Tensor,
    *,
    class_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy over the last dimension; labels of -100 do not count.

    Args:
        scores: ``(..., classes)``.
        labels: ``(...)``.
        class_weights: One weight for each class.
        label_smoothing: Share of probability that goes to all classes (arXiv:1512.00567, 7).
    """
    weights = None if class_weights is None else scores.new_tensor(class_weights)
    return functional.cross_entropy(
        scores.reshape(-1, scores.shape[-1]),
        labels.reshape(-1),
        weight=weights,
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
    )


def focal(
    scores: Tensor,
    labels: Tensor,
    *,
    gamma: float = 2.0,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Focal loss (arXiv:1708.02002, equation 5): what is right already counts less.

    Args:
        scores: ``(..., classes)``.
        labels: ``(...)``; -100 does not count.
        gamma: How much less; 0 is cross-entropy.
        class_weights: One weight for each class, the paper's alpha.
    """
    scores, labels = scores.reshape(-1, scores.shape[-1]), labels.reshape(-1)
    counted = labels != IGNORED
    target = labels.masked_fill(~counted, 0).unsqueeze(-1)
    log_probability = functional.log_softmax(scores, dim=-1).gather(-1, target).squeeze(-1)
    losses = -((1 - log_probability.exp()) ** gamma) * log_probability
    if class_weights is not None:
        losses = losses * scores.new_tensor(class_weights)[target.squeeze(-1)]
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def binary_cross_entropy(
    scores: Tensor, labels: Tensor, *, pos_weight: float | Sequence[float] | None = None
) -> Tensor:
    """Binary cross-entropy of each output by itself.

    Args:
        scores: ``(..., labels)``.
        labels: The same shape, each from 0 to 1.
        pos_weight: Weight of a label that holds, one for all or one for each.
    """
    weight = None if pos_weight is None else scores.new_tensor(pos_weight)
    return functional.binary_cross_entropy_with_logits(
        scores, labels.to(scores.dtype), pos_weight=weight
    )


def binary_focal(
    scores: Tensor, labels: Tensor, *, gamma: float = 2.0, alpha: float | None = None
) -> Tensor:
    """Focal loss of each output by itself (arXiv:1708.02002, equation 5).

    Args:
        scores: ``(..., labels)``.
        labels: The same shape, 0 or 1.
        gamma: How much less counts what is right already.
        alpha: Weight of a label that holds; one that does not has the rest of 1.
    """
    labels = labels.to(scores.dtype)
    losses = functional.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    losses = (1 - (-losses).exp()) ** gamma * losses
    if alpha is not None:
        losses = losses * (alpha * labels + (1 - alpha) * (1 - labels))
    return losses.mean()


def coral(
    scores: Tensor, labels: Tensor, *, importance_weights: Sequence[float] | None = None
) -> Tensor:
    """Loss of ordinal regression (CORAL, arXiv:1901.07884), the mean over the rows.

    Args:
        scores: ``(rows, levels - 1)``, of being above each level but the last.
        labels: ``(rows,)``, numbers of levels; -100 does not count.
        importance_weights: The paper's lambda, one for each score.
    """
    counted = labels != IGNORED
    above = labels.unsqueeze(-1) > torch.arange(scores.shape[-1], device=scores.device)
    weights = None if importance_weights is None else scores.new_tensor(importance_weights)
    losses = functional.binary_cross_entropy_with_logits(
        scores, above.to(scores.dtype), weights, reduction="none"
    )
    return (losses.sum(-1) * counted).sum() / counted.sum().clamp(min=1)


def _regression(difference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss of labels that may have the shape of the scores or lack their last dimension."""

    @functools.wraps(difference)
    def loss(scores: Tensor, labels: Tensor, **parameters: float) -> Tensor:
        labels = labels.to(scores.dtype)
        if scores.numel() == labels.numel():
            labels = labels.reshape(scores.shape)
        return difference(scores, labels, **parameters)

    return loss


@_regression
def mse(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error."""
    return functional.mse_loss(scores, labels)


@_regression
def l1(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean absolute error."""
    return functional.l1_loss(scores, labels)


@_regression
def huber(scores: Tensor, labels: Tensor, *, delta: float = 1.0) -> Tensor:
    """Squared up to `delta`, absolute beyond (Huber 1964)."""
    return functional.huber_loss(scores, labels, delta=delta)


LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "focal": focal,
    "binary_cross_entropy": binary_cross_entropy,
    "binary_focal": binary_focal,
    "mse": mse,
    "l1": l1,
    "huber": huber,
    "coral": coral,
    "contrastive": row_losses.contrastive,
    "multiple_negatives_ranking": row_losses.multiple_negatives_ranking,
    "cosine_similarity": row_losses.cosine_similarity,
    "cosine_embedding": row_losses.cosine_embedding,
    "triplet": row_losses.triplet,
    "bradley_terry": row_losses.bradley_terry,
    "listwise": row_losses.listwise,
}
"""Every loss by its name; what a head type takes of them is its `PredictionHead.losses`."""

ONE_OF_MANY = ("cross_entropy", "focal")
ANY_NUMBER = ("binary_cross_entropy", "binary_focal")
NUMBERS = ("mse", "l1", "huber")


def loss_function(loss: str | Mapping[str, Any] | None, kinds: Sequence[str], size: int) -> Loss:
    """The loss that a configuration names.

    Args:
        loss: A name, or ``{"type": name, ...}`` with its parameters; None is the first of `kinds`.
        kinds: The names that make sense here.
        size: Number of classes or outputs, which a parameter with one value for each must have.

    Raises:
        ConfigError: If the loss makes no sense here, or does not have such a parameter.
        UnknownNameError: If there is none of that name.
    """
    given = dict(loss) if isinstance(loss, Mapping) else {}
    given.pop("type", None)
    kind = loss_name(loss, kinds)
    if kind not in LOSSES:
        raise UnknownNameError("loss", kind, LOSSES)
    if kind not in kinds:
        raise ConfigError(f"loss={kind!r} makes no sense here; {', '.join(kinds)} would.")
    parameters = inspect.signature(LOSSES[kind]).parameters
    known = {name: p.default for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(
                f"The loss {kind!r} has no parameter {name!r}; it has {', '.join(known) or 'none'}."
            )
        if isinstance(known[name], bool):
            if not isinstance(value, bool):
                raise ConfigError(f"{name}={value!r} should be True or False.")
        else:
            _check_parameter(name, value, size)
    return functools.partial(LOSSES[kind], **given)


def loss_name(loss: str | Mapping[str, Any] | None, kinds: Sequence[str]) -> str:
    """The name of the loss that a configuration names; see `loss_function`."""
    return str(loss.get("type") if isinstance(loss, Mapping) else loss or kinds[0])


def _check_parameter(name: str, value: Any, size: int) -> None:
    many = isinstance(value, Sequence) and not isinstance(value, str)
    values = list(value) if many else [value]
    if not all(type(each) in (int, float) and each >= 0 for each in values if each is not None):
        raise ConfigError(f"{name}={value!r} should be numbers that are not negative.")
    if name == "temperature" and value == 0:
        raise ConfigError("temperature=0 has no meaning; it divides.")
    if many and len(values) != size:
        raise ConfigError(f"{name} has {len(values)} values, but there are {size} outputs.")
