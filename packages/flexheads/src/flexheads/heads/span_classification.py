"""Heads that label spans of tokens: those that are given, or all up to some width."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils.generic import ModelOutput

from flexheads.errors import ConfigError, LabelError
from flexheads.heads.base import PredictionHead, norm_eps
from flexheads.heads.config import LabelledConfig
from flexheads.heads.features import Features
from flexheads.heads.inputs import Samples, Texts
from flexheads.heads.labels import InputShape, check_indices, check_whole_numbers
from flexheads.heads.layers import Stacked
from flexheads.heads.losses import IGNORED
from flexheads.heads.outputs import head_output
from flexheads.heads.pooling import real_positions
from flexheads.heads.source import Source
from flexheads.heads.text import RowText

NOWHERE = -1
"""Begin and end of a span that is none."""


@dataclasses.dataclass
class SpanClassificationOutput(ModelOutput):
    """Output of `SpanClassificationHead`.

    Attributes:
        loss: The loss, where labels were given.
        logits: ``(batch, spans, num_labels)``.
        spans: First and last token of each span, ``(batch, spans, 2)``; -1 where there is none.
        hidden_states: The backbone's hidden states, where they were asked for.
        attentions: The backbone's attentions, where they were asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    spans: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SpanClassificationConfig(LabelledConfig):
    """Configuration of `SpanClassificationHead`.

    Attributes:
        max_width: The widest span that is tried where none are given, in tokens. Wider ones that
            are given share its embedding.
        width_size: Size of the embeddings of widths; 0 for none.
        attention: Whether a span is also read as a weighted mean of its tokens.
    """

    layers: int = 2
    activation_function: str | None = "relu"
    max_width: int = 8
    width_size: int = 20
    attention: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("max_width", 1), ("width_size", 0)):
            if type(self[name]) is not int or self[name] < least:
                raise ConfigError(f"{name}={self[name]!r} should be a whole number from {least}.")
        if not isinstance(self.attention, bool):
            raise ConfigError(f"attention={self.attention!r} should be True or False.")


class SpanClassificationHead(PredictionHead):
    """Classifies spans of tokens by their ends, their inside and their width (arXiv:1707.07045, 4).

    Logits are ``(batch, spans, num_labels)``. Where no spans are given, all up to ``max_width``
    are classified, in the order of `spans_up_to`.
    """

    head_type = "span_classification"
    config_class = SpanClassificationConfig
    label_names = ("labels", "spans")
    samples: ClassVar[Samples] = Texts("refuse", offsets=True)

    def __init__(
        self, name: str, config: SpanClassificationConfig, model_config: PretrainedConfig
    ) -> None:
        super().__init__(name, config, model_config)
        size = self.hidden_size * (2 + config.attention) + config.width_size
        sizes = [size, *[self.hidden_size] * (config.layers - 1), self.num_outputs]
        if config.attention:
            self.attention = nn.Linear(self.hidden_size, 1)
        if config.width_size:
            self.widths = nn.Embedding(config.max_width, config.width_size)
        self.layers = Stacked(sizes, config, self.dropout_prob, norm_eps(model_config))
        self.initialise()

    @property
    def num_outputs(self) -> int:
        return int(self.config.num_labels)

    def initialise(self) -> None:
        super().initialise()
        if self.config.width_size:
            nn.init.normal_(self.widths.weight, std=self.initializer_range)

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        spans, given = labels.get("spans"), labels.get("labels")
        where, rows, length = f"of head {self.name!r}", shape.rows, shape.length
        shapes: list[tuple[int | None, ...]] = []
        if spans is not None:
            _check_spans(f"spans {where}", spans, shape)
            shapes = [(rows, spans.shape[1])]
        elif length is None:
            shapes = [(rows, None, self.config.max_width), (rows, None)]
        else:
            widest = self.config.max_width
            shapes = [(rows, length, widest), (rows, length * widest)]
        if given is not None:
            check_indices(f"labels {where}", given, self.num_outputs, shapes)

    def forward(self, features: Features, **labels: Any) -> Any:
        """Classifies spans.

        Args:
            features: What the backbone computed.
            labels: ``spans``, first and last token of each, ``(batch, spans, 2)``, negative where
                there is none; None takes all up to ``max_width``. ``labels``, ``(batch, spans)``;
                for all spans also ``(batch, sequence, max_width)``, by the first token and by the
                width less one. -100 does not count.

        Returns:
            A `SpanClassificationOutput`.
        """
        hidden, spans, given = features.hidden, labels.get("spans"), labels.get("labels")
        if spans is None:
            spans = spans_up_to(self.config.max_width, hidden, real_positions(features))
        scores = self.layers(self.represent(hidden, spans))
        spans = spans.masked_fill((spans < 0).any(dim=-1, keepdim=True), NOWHERE)
        loss = None
        if given is not None:
            given = given.reshape(scores.shape[:-1])
            loss = self.loss(scores, given.masked_fill(spans[..., 0] < 0, IGNORED))
        return head_output(
            SpanClassificationOutput, features.output, loss=loss, logits=scores, spans=spans
        )

    def represent(self, hidden: Tensor, spans: Tensor) -> Tensor:
        """What stands for each span: its ends, the weighted mean of its tokens, and its width.

        Args:
            hidden: ``(batch, sequence, hidden)``.
            spans: ``(batch, spans, 2)``.
        """
        begin, end = spans.clamp(min=0).unbind(dim=-1)
        rows = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1)
        parts = [hidden[rows, begin], hidden[rows, end]]
        if self.config.attention:
            at = torch.arange(hidden.shape[1], device=hidden.device)
            outside = (at < begin[..., None]) | (at > end[..., None])
            scores = self.attention(hidden).transpose(1, 2)
            scores = scores.expand(outside.shape).masked_fill(
                outside, torch.finfo(scores.dtype).min
            )
            parts.append(scores.softmax(dim=-1) @ hidden)
        if self.config.width_size:
            parts.append(self.widths((end - begin).clamp(0, self.config.max_width - 1)))
        return torch.cat(parts, dim=-1)

    def decode(  # type: ignore[override]  # its own options
        self,
        output: Any,
        source: Source | None = None,
        *,
        overlapping: bool = False,
        ignore_labels: Collection[str] = ("O",),
    ) -> list[Any]:
        """The labelled spans of each row.

        Args:
            output: What `forward` returned.
            source: The inputs, with texts and offsets.
            overlapping: Whether spans may overlap; else of two that do the more likely one stays.
            ignore_labels: Names of labels that say that a span is none.

        Returns:
            For each row a list of ``{"entity_group", "score", "word", "start", "end"}``, from left
            to right; start and end are characters of the text.

        Raises:
            UnsupportedError: If the source lacks what is needed.
        """
        scores, labels = output.logits.detach().float().softmax(dim=-1).cpu().max(dim=-1)
        names, rows = self.config.id2label, []
        for row, spans in enumerate(output.spans.tolist()):
            text = RowText(source, row, f"Decoding head {self.name!r}")
            own = zip(scores[row].tolist(), spans, labels[row].tolist(), strict=True)
            named = [
                (score, begin, end, names[label])
                for score, (begin, end), label in own
                if begin >= 0 and names[label] not in ignore_labels
            ]
            rows.append(_chosen(text, sorted(named, key=lambda span: -span[0]), overlapping))
        return rows


def _chosen(
    text: RowText, named: Sequence[tuple[float, int, int, str]], overlapping: bool
) -> list[dict[str, Any]]:
    """The spans of a row that stay, from left to right; they come by score."""
    tokens = {token.index: token for token in text.tokens}
    taken: set[int] = set()
    found = []
    for score, begin, end, name in named:
        inside = set(range(begin, end + 1))
        # A span from one text into another, or over special tokens, says nothing.
        if not inside <= tokens.keys() or len({tokens[i].part for i in inside}) != 1:
            continue
        if overlapping or not taken & inside:
            taken |= inside
            place = text.piece(tokens[begin].part, tokens[begin].start, tokens[end].end)
            found.append({"entity_group": name, "score": score, **place})
    return sorted(found, key=lambda span: (span["start"], span["end"]))


def spans_up_to(width: int, hidden: Tensor, real: Tensor | None = None) -> Tensor:
    """All spans up to a width, ``(batch, sequence * width, 2)``: by first token, then by width.

    Args:
        width: The largest width, in tokens.
        hidden: ``(batch, sequence, hidden)``.
        real: Which positions are no padding, ``(batch, sequence)``; None is all.

    Returns:
        First and last token of each; -1 for both where it would not be inside.
    """
    batch, length = hidden.shape[:2]
    begin = torch.arange(length, device=hidden.device).repeat_interleave(width)
    end = begin + torch.arange(width, device=hidden.device).repeat(length)
    spans = torch.stack([begin, end], dim=-1).expand(batch, -1, -1)
    inside = (end < length).expand(batch, -1)
    if real is not None:
        inside = inside & real[:, begin] & real[:, end.clamp(max=length - 1)]
    return spans.masked_fill(~inside.unsqueeze(-1), NOWHERE)


def _check_spans(where: str, spans: Any, shape: InputShape) -> None:
    check_whole_numbers(where, spans, [(shape.rows, None, 2)])
    if torch.compiler.is_compiling():
        return
    begin, end = spans.unbind(dim=-1)
    there = (begin >= 0) & (end >= 0)
    if shape.length is not None and bool((there & (spans.amax(dim=-1) >= shape.length)).any()):
        raise LabelError(
            f"{where} reach to {int(spans.max())}, but a row has {shape.length} tokens."
        )
    wrong = there & (end < begin)
    if bool(wrong.any()):
        row, number = wrong.nonzero()[0].tolist()
        raise LabelError(
            f"{where}: span {number} of row {row} ends at {int(end[row, number])}, before it "
            f"starts at {int(begin[row, number])}."
        )
