"""Dependency parsing: the head and the relation of every word, scored by biaffine products."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig
from transformers.utils.generic import ModelOutput

from flexheads.errors import ConfigError, LabelError, UnsupportedError
from flexheads.heads.base import PredictionHead
from flexheads.heads.config import NamedLabelsConfig
from flexheads.heads.features import Features
from flexheads.heads.inputs import Piece, Samples, Texts
from flexheads.heads.labels import InputShape, check_indices, check_whole_numbers
from flexheads.heads.losses import IGNORED, cross_entropy
from flexheads.heads.outputs import head_output
from flexheads.heads.source import Source
from flexheads.heads.text import RowText
from flexheads.heads.trees import best_tree


@dataclasses.dataclass
class DependencyParsingOutput(ModelOutput):
    """Output of `DependencyParsingHead`.

    Attributes:
        loss: That of the arcs and that of the relations, where labels were given.
        rel_preds: Score of each relation, ``(batch, sequence, sequence + 1, num_labels)``, of each
            word to each head; head 0 is the root.
        arc_preds: Score of each head, ``(batch, sequence, sequence + 1)``.
        hidden_states: The backbone's hidden states, where they were asked for.
        attentions: The backbone's attentions, where they were asked for.
    """

    loss: Tensor | None = None
    rel_preds: Tensor | None = None
    arc_preds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DependencyParsingConfig(NamedLabelsConfig):
    """Configuration of `DependencyParsingHead`; the labels are the relations, and so is the loss.

    Attributes:
        ignore_pad_arcs: Whether words do not count in the loss whose head has the number of the
            model's padding token, as in the `adapters` library. Where that is 0, its parsers never
            learn which word hangs on the root.
    """

    num_labels: int = 2
    ignore_pad_arcs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.ignore_pad_arcs, bool):
            raise ConfigError(f"ignore_pad_arcs={self.ignore_pad_arcs!r} should be True or False.")


class Biaffine(nn.Module):
    """Scores of all pairs of two sequences: ``x W y``, with a 1 appended where there is a bias.

    It starts with zeros (arXiv:1611.01734, section 2.2).

    Args:
        size: The size of what is scored.
        outputs: Scores for each pair.
        bias_y: Whether a 1 is appended to the second one; the first always has one.
    """

    def __init__(self, size: int, outputs: int, bias_y: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, size + 1, size + bias_y))
        self.bias_y = bias_y

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Maps ``(batch, n, size)`` and ``(batch, m, size)`` to ``(batch, outputs, n, m)``."""
        x = functional.pad(x, (0, 1), value=1.0)
        y = functional.pad(y, (0, 1), value=1.0) if self.bias_y else y
        scores: Tensor = (x.unsqueeze(1) @ self.weight) @ y.transpose(1, 2).unsqueeze(1)
        return scores


class Sentences(Texts):
    """A list of words, or a text whose words are those of the tokenizer."""

    looks = "a list of words, or a text"

    def batch(self, processor: Any, pieces: Sequence[Piece]) -> tuple[dict[str, Any], Source]:
        inputs, source = super().batch(processor, pieces)
        return {**inputs, "word_starts": word_starts_of(source)}, source


class DependencyParsingHead(PredictionHead):
    """A shallow biaffine parser (arXiv:1611.01734, as in arXiv:2008.06788).

    A word is the mean of its tokens, and the root is the first token of the row.
    """

    head_type = "dependency_parsing"
    config_class = DependencyParsingConfig
    label_names = ("word_starts", "labels_arcs", "labels_rels")
    samples: ClassVar[Samples] = Sentences("refuse", offsets=True)

    def __init__(
        self, name: str, config: DependencyParsingConfig, model_config: PretrainedConfig
    ) -> None:
        super().__init__(name, config, model_config)
        self.pad = getattr(model_config, "pad_token_id", None)
        self.biaffine_arcs = Biaffine(self.hidden_size, 1, bias_y=False)
        self.biaffine_rels = Biaffine(self.hidden_size, config.num_labels, bias_y=True)
        self.dropout = nn.Dropout(self.dropout_prob)

    @property
    def num_outputs(self) -> int:
        return int(self.config.num_labels)

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        """See `PredictionHead.check_labels`.

        Raises:
            LabelError: Also if there are no word starts, or only one of the two labels.
        """
        starts = labels.get("word_starts")
        if starts is None:
            raise LabelError(_WITHOUT_WORDS.format(self.name))
        check_whole_numbers(f"word_starts of head {self.name!r}", starts, [(shape.rows, None)])
        self._check_ends(starts, shape.length)
        given = {key: labels[key] for key in self.label_names[1:] if labels.get(key) is not None}
        if len(given) == 1:
            raise LabelError(
                f"Head {self.name!r} got {next(iter(given))} alone; it learns from labels_arcs and "
                "labels_rels together."
            )
        for key, value in given.items():
            self._check_words(key, value, starts, shape)

    def _check_words(self, key: str, labels: Any, starts: Tensor, shape: InputShape) -> None:
        """Refuses labels that are not one for each word; what stands behind the words is free."""
        where = f"{key} of head {self.name!r}"
        check_whole_numbers(where, labels, [(shape.rows, None)])
        if torch.compiler.is_compiling():
            return
        words = _spans(starts, shape.length or starts.shape[1]).real.sum(dim=1)
        if bool((words > labels.shape[1]).any()):
            raise LabelError(
                f"{where} have {labels.shape[1]} in a row, but a row has {int(words.max())} words."
            )
        at = torch.arange(labels.shape[1], device=labels.device)
        own = labels.masked_fill(at >= words.to(at.device).unsqueeze(1), IGNORED)
        count = self.num_outputs if key == "labels_rels" else int(words.max()) + 1
        check_indices(where, own, count, [(shape.rows, None)])

    def _check_ends(self, starts: Tensor, length: int | None) -> None:
        if length is None or torch.compiler.is_compiling():
            return
        beyond = starts[(starts > length) & (starts != self.pad)]
        if beyond.numel():
            raise LabelError(
                f"word_starts of head {self.name!r} hold {int(beyond[0])}, but a row has {length} "
                "tokens. Leave out the words that were cut off."
            )

    def forward(self, features: Features, **labels: Any) -> Any:
        """Scores heads and relations of words.

        Args:
            features: What the backbone computed.
            labels: ``word_starts`` says where the words are: for each row the position of the first
                token of each word, and at last the position behind the last word; it ends where
                the numbers rise no more, so that 0 or -100 can fill it. ``labels_arcs`` and
                ``labels_rels`` are the number of each word's head, 0 for the root and else counted
                from 1, and that of its relation; -100 does not count. All are ``(batch, any)``.

        Returns:
            A `DependencyParsingOutput`.

        Raises:
            LabelError: If there are no word starts.
        """
        if labels.get("word_starts") is None:
            raise LabelError(_WITHOUT_WORDS.format(self.name))
        hidden = self.dropout(features.hidden)
        spans = _spans(labels["word_starts"], hidden.shape[1])
        words = _means(hidden, spans)
        heads = torch.cat([hidden[:, :1], words], dim=1)
        arcs = self.biaffine_arcs(words, heads).squeeze(1)
        relations = self.biaffine_rels(words, heads).permute(0, 2, 3, 1)
        loss = None
        if labels.get("labels_arcs") is not None and labels.get("labels_rels") is not None:
            loss = self._loss(arcs, relations, spans, labels)
        return head_output(
            DependencyParsingOutput,
            features.output,
            loss=loss,
            rel_preds=relations,
            arc_preds=arcs,
        )

    def _loss(
        self, arcs: Tensor, relations: Tensor, spans: _Spans, labels: Mapping[str, Tensor]
    ) -> Tensor:
        """Cross-entropy of the heads, and the loss of the relations to the right heads."""
        heads = _fitted(labels["labels_arcs"], arcs.shape[1])
        counted = spans.real & (heads >= 0)
        if self.config.ignore_pad_arcs:
            counted &= heads != self.pad
        right = heads.masked_fill(~counted, 0)[..., None, None]
        own = relations.gather(2, right.expand(-1, -1, 1, relations.shape[-1])).squeeze(2)
        kinds = _fitted(labels["labels_rels"], arcs.shape[1])
        of_arcs = cross_entropy(arcs, heads.masked_fill(~counted, IGNORED))
        return of_arcs + self.loss(own, kinds.masked_fill(~counted, IGNORED))

    def decode(  # type: ignore[override]  # its own options
        self,
        output: Any,
        source: Source | None = None,
        *,
        word_starts: Tensor | None = None,
        single_root: bool = True,
        part: int = 0,
    ) -> list[Any]:
        """The best tree of each row: a maximum spanning tree over the probabilities of its arcs.

        Args:
            output: What `forward` returned.
            source: The inputs, with texts, offsets and word ids.
            word_starts: What `forward` got; None takes the words of the source.
            single_root: Whether exactly one word hangs on the root.
            part: The number of the text that was parsed, where the source has pairs.

        Returns:
            For each row its words in order, each
            ``{"id", "word", "start", "end", "head", "relation", "score"}``: ids are counted from 1,
            the head is an id, or 0 for the root, the score is the probability of both, and start
            and end are characters of the text.

        Raises:
            UnsupportedError: If the source lacks what is needed.
        """
        texts = [
            RowText(source, row, f"Decoding head {self.name!r}")
            for row in range(output.arc_preds.shape[0])
        ]
        if word_starts is None:
            word_starts = word_starts_of(source, part)
        spans = _spans(word_starts.cpu(), output.arc_preds.shape[1])
        rows = []
        for row, text in enumerate(texts):
            places = spans.of_row(row)
            arcs = self._tree(output, row, len(places), single_root)
            rows.append(
                [
                    {"id": number, **_shown(text, place), **arc}
                    for number, (place, arc) in enumerate(zip(places, arcs, strict=True), 1)
                ]
            )
        return rows

    def _tree(self, output: Any, row: int, count: int, single_root: bool) -> list[dict[str, Any]]:
        """Head, relation and score of each of the first `count` words."""
        arcs = output.arc_preds[row, :count, : count + 1].detach().float().cpu().log_softmax(-1)
        relations = output.rel_preds[row, :count, : count + 1].detach().float().cpu()
        shares, kinds = relations.softmax(dim=-1).max(dim=-1)
        names, found = self.config.id2label, []
        for word, head in enumerate(best_tree(arcs.double().tolist(), single_root)):
            score = float(arcs[word, head].exp() * shares[word, head])
            found.append({"head": head, "relation": names[int(kinds[word, head])], "score": score})
        return found


_WITHOUT_WORDS = (
    "Head {!r} parses words, so it needs word_starts beside the inputs: for each row the position "
    "of the first token of each word, and the position behind the last word. "
    "flexheads.heads.word_starts_of gives them for what a fast tokenizer wrote."
)


def word_starts_of(source: Source | None, part: int = 0) -> Tensor:
    """The ``word_starts`` of `DependencyParsingHead` for tokenised texts.

    Args:
        source: The inputs, with word ids.
        part: The number of the text to parse, where the source has pairs.

    Returns:
        ``(batch, most words + 1)``, filled with -100. A word without a token is left out.

    Raises:
        UnsupportedError: If the source has no word ids.
    """
    if source is None or source.word_ids is None:
        raise UnsupportedError(
            "Words are found by the source's word_ids, which a fast tokenizer gives; else pass "
            "word_starts."
        )
    rows = []
    for row, words in enumerate(source.word_ids):
        parts = None if source.sequence_ids is None else source.sequence_ids[row]
        own = [
            (position, word)
            for position, word in enumerate(words)
            if word is not None and (parts is None or parts[position] == part)
        ]
        starts = [p for at, (p, word) in enumerate(own) if not at or own[at - 1][1] != word]
        rows.append(starts + ([own[-1][0] + 1] if own else []))
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [IGNORED] * (width - len(row)) for row in rows]).view(-1, width)


class _Spans(NamedTuple):
    """Where words are: first position, position behind the last, and whether there is a word."""

    begin: Tensor
    end: Tensor
    real: Tensor

    def of_row(self, row: int) -> list[tuple[int, int]]:
        """First position of each word of a row, and the position behind its last."""
        there = self.real[row]
        return list(
            zip(self.begin[row][there].tolist(), self.end[row][there].tolist(), strict=True)
        )


def _spans(starts: Tensor, length: int) -> _Spans:
    """The words of each row, ``(batch, length)`` each, as the starts tell them."""
    begin, end = _fitted(starts[:, :-1], length), _fitted(starts[:, 1:], length)
    rising = (begin >= 0) & (end > begin) & (end <= length)
    return _Spans(begin, end, rising.cumprod(dim=1).bool())


def _fitted(labels: Tensor, length: int) -> Tensor:
    """Labels of words, as many in a row as there are tokens."""
    return functional.pad(labels, (0, length - labels.shape[1]), value=IGNORED)


def _means(hidden: Tensor, spans: _Spans) -> Tensor:
    """The mean over the tokens of each word, and zeros where there is none."""
    at = torch.arange(hidden.shape[1], device=hidden.device)
    inside = (spans.begin[..., None] <= at) & (at < spans.end[..., None]) & spans.real[..., None]
    weights = inside.to(hidden.dtype)
    return weights @ hidden / weights.sum(dim=-1, keepdim=True).clamp(min=1.0)


def _shown(text: RowText, place: tuple[int, int]) -> dict[str, Any]:
    tokens = [token for token in text.tokens if token.index in range(*place)]
    if not tokens:
        return {"word": "", "start": 0, "end": 0}
    return text.piece(tokens[0].part, tokens[0].start, tokens[-1].end)
