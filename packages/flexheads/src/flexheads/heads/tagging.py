"""Heads that label every token, and the spans that those labels tell of."""

from __future__ import annotations

import dataclasses
import itertools
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import TokenClassifierOutput

from flexheads.errors import ConfigError, LabelError, UnsupportedError
from flexheads.heads.base import FeedForwardHead
from flexheads.heads.config import LabelledConfig
from flexheads.heads.features import Features
from flexheads.heads.inputs import Samples, Texts
from flexheads.heads.labels import InputShape, check_indices
from flexheads.heads.losses import IGNORED
from flexheads.heads.outputs import head_output
from flexheads.heads.source import Source
from flexheads.heads.text import RowText, Token

AGGREGATIONS = ("none", "simple", "first", "average", "max")
"""How tokens become spans; see `TaggingHead.decode`."""

_PREFIX = re.compile(r"([BILUES])-(.+)")


class TaggingHead(FeedForwardHead):
    """Classifies every token. Logits are ``(batch, sequence, num_labels)``."""

    head_type = "tagging"
    config_class: ClassVar[type[LabelledConfig]] = LabelledConfig
    samples: ClassVar[Samples] = Texts("join", offsets=True)

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        if (given := labels.get("labels")) is not None:
            check_token_labels(f"labels of head {self.name!r}", given, self.num_outputs, shape)

    @property
    def packs(self) -> bool:
        """See `FeedForwardHead.packs`."""
        return type(self).finish is TaggingHead.finish

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; ``labels`` is ``(batch, sequence)``.

        Labels of -100, and of positions outside of the attention mask, do not count.
        """
        given, mask, loss = labels.get("labels"), features.attention_mask, None
        if given is not None:
            if mask is not None and mask.dim() == 2:
                given = given.masked_fill(mask == 0, IGNORED)
            loss = self.loss(scores, given)
        return head_output(TokenClassifierOutput, features.output, loss=loss, logits=scores)

    def decode(  # type: ignore[override]  # its own options
        self,
        output: Any,
        source: Source | None = None,
        *,
        aggregation: str = "simple",
        merge_equal: bool = True,
        ignore_labels: Collection[str] = ("O",),
    ) -> list[Any]:
        """The labelled spans of each row.

        Labels are read as a scheme of spans where their names say so: ``B-`` begins a span and
        ``I-`` continues it; ``L-`` or ``E-`` ends it and ``U-`` or ``S-`` is one by itself, where
        there is a ``B-`` of the same name. A label without such a prefix goes on as long as it is
        repeated.

        Args:
            output: What `forward` returned.
            source: The inputs, with texts and offsets; with word ids for the last three of
                `aggregation`.
            aggregation: ``"none"`` gives every token by itself, ``"simple"`` the spans of tokens.
                The others label whole words, and give the spans of words: by the word's ``"first"``
                token, by the ``"average"`` of its tokens, or by the one that is most sure
                (``"max"``).
            merge_equal: Whether neighbours with the same label without a prefix are one span.
            ignore_labels: Names of labels, or of what they label, that are left out.

        Returns:
            For each row a list of ``{"entity_group", "score", "word", "start", "end"}``, the score
            being the mean over the span, and the place in characters of the text; without
            aggregation of ``{"entity", "score", "index", "word", "start", "end"}``.

        Raises:
            UnsupportedError: If the source lacks what is needed.
            ConfigError: If there is no such aggregation.
        """
        if aggregation not in AGGREGATIONS:
            raise ConfigError(
                f"aggregation={aggregation!r} is unknown; it can be {', '.join(AGGREGATIONS)}."
            )
        rows = []
        for row, shares in enumerate(self.shares(output, source)):
            text = RowText(source, row, f"Decoding head {self.name!r}")
            units = _units(text.tokens, shares, aggregation, self.config.id2label)
            found = self._found(text, units, aggregation, merge_equal)
            kinds = ("entity", "entity_group")
            rows.append([f for f in found if not any(f.get(k) in ignore_labels for k in kinds)])
        return rows

    def _found(
        self, text: RowText, units: Sequence[Unit], aggregation: str, merge_equal: bool
    ) -> list[dict[str, Any]]:
        """What `decode` says of a row."""
        if aggregation == "none":
            return [{"entity": u.label, **_shown(text, [u], u.tokens[0].index)} for u in units]
        spans = group_spans(units, self.config.id2label.values(), merge_equal)
        return [{"entity_group": name, **_shown(text, span)} for name, span in spans]

    def shares(self, output: Any, source: Source | None = None) -> Tensor:
        """The probability of each label, as `decode` reads it: ``(batch, sequence, num_labels)``.

        Args:
            output: What `forward` returned.
            source: The inputs, for types that look at a row as a whole.
        """
        scores: Tensor = output.logits.detach().float().softmax(dim=-1)
        return scores.cpu()


def check_token_labels(where: str, labels: Any, count: int, shape: InputShape) -> None:
    """Refuses labels that are not one class number for each token.

    Args:
        where: What to call them.
        labels: The labels; -100 does not count.
        count: Number of classes.
        shape: The shape of the inputs.

    Raises:
        LabelError: If there are more or fewer, or their dtype or a value is wrong.
    """
    length = shape.length
    if isinstance(labels, Tensor) and labels.dim() == 2 and length not in (None, labels.shape[1]):
        raise LabelError(
            f"{where} have {labels.shape[1]} in a row, but a row has {length} tokens. Give each "
            f"token one, special tokens and padding too; {IGNORED} where it does not count."
        )
    check_indices(where, labels, count, [(shape.rows, length)])


@dataclasses.dataclass(frozen=True)
class Unit:
    """What gets one label: a token, or the tokens of a word.

    Attributes:
        tokens: The tokens.
        label: The name of the label.
        score: Its probability.
    """

    tokens: Sequence[Token]
    label: str
    score: float


def group_spans(
    units: Iterable[Unit], labels: Collection[str], merge_equal: bool = True
) -> list[tuple[str, list[Unit]]]:
    """The spans that labels tell of, each with the name of what it is; see `TaggingHead.decode`.

    Args:
        units: Tokens or words with their labels, in order.
        labels: All labels that there are, which tell the scheme.
        merge_equal: Whether neighbours with the same label without a prefix are one span.
    """
    spans: list[tuple[str, list[Unit]]] = []
    ended, part = True, None
    for unit in units:
        prefix, name = _parsed(unit.label, labels)
        plain = prefix is None and not merge_equal
        begins = ended or prefix in ("B", "U", "S") or plain or unit.tokens[0].part != part
        if begins or spans[-1][0] != name:
            spans.append((name, []))
        spans[-1][1].append(unit)
        ended, part = prefix in ("L", "U", "E", "S"), unit.tokens[0].part
    return spans


def _parsed(label: str, labels: Collection[str]) -> tuple[str | None, str]:
    """The prefix of a label, and what it labels."""
    match = _PREFIX.fullmatch(label)
    # "E-mail" is no end of a span where nothing can begin one.
    if match is None or (match[1] not in "BI" and f"B-{match[2]}" not in labels):
        return None, label
    return match[1], match[2]


def _units(
    tokens: Sequence[Token], shares: Tensor, aggregation: str, names: Mapping[int, str]
) -> list[Unit]:
    by_word = aggregation not in ("none", "simple")
    if by_word and any(token.word is None for token in tokens):
        raise UnsupportedError(
            f"aggregation={aggregation!r} labels words, so the source needs word_ids, which a fast "
            'tokenizer gives. Take "simple" without.'
        )
    groups = [
        list(group)
        for _, group in itertools.groupby(
            tokens, lambda token: (token.part, token.word if by_word else token.index)
        )
    ]
    scores, labels = _shares_of(groups, shares, aggregation).max(dim=-1)
    found = zip(groups, labels.tolist(), scores.tolist(), strict=True)
    return [Unit(own, names[label], score) for own, label, score in found]


def _shares_of(groups: Sequence[Sequence[Token]], shares: Tensor, aggregation: str) -> Tensor:
    """The probabilities of words, ``(words, num_labels)``, from those of their tokens."""
    if aggregation == "average":
        number = torch.tensor([n for n, own in enumerate(groups) for _ in own], dtype=torch.long)
        rows = shares[[token.index for own in groups for token in own]]
        sums = shares.new_zeros(len(groups), shares.shape[-1]).index_add_(0, number, rows)
        return sums / torch.tensor([[len(own)] for own in groups]).view(-1, 1)
    if aggregation == "max":
        sure = shares.amax(dim=-1).tolist()
        return shares[[max((token.index for token in own), key=sure.__getitem__) for own in groups]]
    return shares[[own[0].index for own in groups]]


def _shown(text: RowText, units: Sequence[Unit], index: int | None = None) -> dict[str, Any]:
    """What a person sees of a span: score, text and place, and the position where it is given."""
    first, last = units[0].tokens[0], units[-1].tokens[-1]
    score = statistics.fmean(unit.score for unit in units)
    where = {} if index is None else {"index": index}
    return {"score": score, **where, **text.piece(first.part, first.start, last.end)}
