"""A tagging head whose labels are chosen together: a linear-chain conditional random field."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchcrf import CRF
from transformers import PretrainedConfig
from transformers.modeling_outputs import TokenClassifierOutput

from flexheads.errors import ConfigError
from flexheads.heads import (
    IGNORED,
    Features,
    LabelledConfig,
    Source,
    TaggingHead,
    head_output,
    real_positions,
)

FORBIDDEN = -1e4
"""The score of a transition that a scheme does not allow."""


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class CRFTaggingConfig(LabelledConfig):
    """Configuration of `CRFTaggingHead`.

    Attributes:
        scheme: ``"bio"`` forbids what that scheme does not allow: an ``I-X`` anywhere but behind a
            ``B-X`` or ``I-X``. None allows everything.
    """

    scheme: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme not in (None, "bio"):
            raise ConfigError(f'scheme={self.scheme!r} is unknown; it can be "bio", or None.')
        if self.loss is not None:
            raise ConfigError("The loss of a CRF is its likelihood; leave loss out.")
        names = self.id2label.values()
        if self.scheme and not all(n == "O" or n[:2] in ("B-", "I-") for n in names):
            raise ConfigError(f'scheme="bio" needs labels O, B-X and I-X, not {list(names)}.')


class CRFTaggingHead(TaggingHead):
    """Labels tokens by the best sequence as a whole (Lafferty et al. 2001; arXiv:1508.01991).

    Logits are the scores of each token by itself, ``(batch, sequence, num_labels)``; transitions
    between neighbouring labels are added to them. The loss is the negative log-likelihood, by the
    number of labels that count. Tokens whose label is -100 are no part of the sequence: their
    neighbours follow each other.
    """

    head_type = "crf_tagging"
    config_class = CRFTaggingConfig

    def __init__(self, name: str, config: CRFTaggingConfig, model_config: PretrainedConfig) -> None:
        super().__init__(name, config, model_config)
        self.crf = CRF(config.num_labels, batch_first=True)
        if config.scheme == "bio":
            labels = [config.id2label[number] for number in range(config.num_labels)]
            _forbid(self.crf, labels)

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; ``labels`` is ``(batch, sequence)``."""
        given, loss = labels.get("labels"), None
        if given is not None:
            counted = (given != IGNORED) & _real(features)
            loss = self.negative_log_likelihood(scores, given, counted)
        return head_output(TokenClassifierOutput, features.output, loss=loss, logits=scores)

    def negative_log_likelihood(self, scores: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        """The loss, by the number of labels that count.

        Args:
            scores: ``(batch, sequence, num_labels)``.
            labels: ``(batch, sequence)``.
            counted: Which of them count, ``(batch, sequence)``.
        """
        rows = counted.any(dim=1)
        if not bool(rows.any()):
            return scores.sum() * 0.0
        scores, labels, counted = _to_the_left(scores[rows], labels[rows], counted[rows])
        labels = labels.masked_fill(~counted, 0)
        likelihood: Tensor = self.crf(scores.float(), labels, mask=counted, reduction="token_mean")
        return -likelihood

    def decode(
        self, output: Any, source: Source | None = None, aggregation: str | None = None, **how: Any
    ) -> list[Any]:
        """The spans of the best sequence of labels; see `flexheads.heads.TaggingHead.decode`.

        Args:
            output: What `forward` returned.
            source: The inputs. Where it has word ids, the first token of each word is labelled.
            aggregation: None is ``"first"`` with word ids, else ``"simple"``.
            how: Further options of tagging.
        """
        known = source is not None and source.word_ids is not None
        chosen = aggregation or ("first" if known else "simple")
        return super().decode(output, source, aggregation=chosen, **how)

    def shares(self, output: Any, source: Source | None = None) -> Tensor:
        """The probability of each label by the token alone, ``(batch, sequence, num_labels)``.

        Where a token is part of the sequence, all but the label of the best sequence are zero.
        """
        scores: Tensor = output.logits.detach()
        shares = scores.float().softmax(dim=-1).cpu()
        counted = _in_sequence(scores, source)
        for row, path in enumerate(self.best(scores, counted)):
            own = counted[row].nonzero().flatten().cpu()
            chosen = torch.zeros(len(own), shares.shape[-1], dtype=torch.bool)
            chosen[torch.arange(len(own)), path] = True
            # Never quite zero, so that what was chosen stays the largest.
            kept = shares[row, own].clamp(min=torch.finfo(shares.dtype).tiny)
            shares[row, own] = kept.masked_fill(~chosen, 0.0)
        return shares

    def best(self, scores: Tensor, counted: Tensor) -> list[list[int]]:
        """The best sequence of labels of each row (Viterbi), for the tokens that count.

        Args:
            scores: ``(batch, sequence, num_labels)``.
            counted: Which tokens count, ``(batch, sequence)``.
        """
        rows = counted.any(dim=1)
        found: list[list[int]] = [[] for _ in range(len(rows))]
        if bool(rows.any()):
            left, _, mask = _to_the_left(scores[rows], counted[rows].long(), counted[rows])
            paths = self.crf.decode(left.float(), mask=mask)
            for row, path in zip(rows.nonzero().flatten().tolist(), paths, strict=True):
                found[row] = path
        return found


def _real(features: Features) -> Tensor:
    real = real_positions(features)
    return torch.ones_like(features.hidden[..., 0], dtype=torch.bool) if real is None else real


def _in_sequence(scores: Tensor, source: Source | None) -> Tensor:
    """Which tokens a sequence of labels is about, ``(batch, sequence)``."""
    counted = torch.ones(scores.shape[:2], dtype=torch.bool, device=scores.device)
    if source is None:
        return counted
    if source.attention_mask is not None:
        counted &= source.attention_mask.to(scores.device) != 0
    for row, words in enumerate(source.word_ids or ()):
        before = [None, *words[:-1]]
        first = [
            word is not None and word != last for word, last in zip(words, before, strict=True)
        ]
        counted[row] &= torch.tensor(first, device=scores.device)
    return counted


def _to_the_left(scores: Tensor, labels: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What counts of each row moved to its left end, in its order."""
    order = (~counted).to(torch.uint8).argsort(dim=1, stable=True)
    length = int(counted.sum(dim=1).max())
    order = order[:, :length]
    scores = scores.gather(1, order.unsqueeze(-1).expand(-1, -1, scores.shape[-1]))
    return scores, labels.gather(1, order), counted.gather(1, order)


def _forbid(crf: nn.Module, labels: Sequence[str]) -> None:
    """Gives the transitions that are not allowed a score that no other can make up for."""
    start, between = crf.start_transitions, crf.transitions
    with torch.no_grad():
        for number, label in enumerate(labels):
            if not label.startswith("I-"):
                continue
            start[number] = FORBIDDEN
            for before, earlier in enumerate(labels):
                if earlier[:2] not in ("B-", "I-") or earlier[2:] != label[2:]:
                    between[before, number] = FORBIDDEN
