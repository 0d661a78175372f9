"""Extractive question answering: where in a text the answer begins and ends, if it is there."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from flexheads.errors import ConfigError, LabelError
from flexheads.heads.base import FeedForwardHead
from flexheads.heads.config import LabelledConfig
from flexheads.heads.features import Features
from flexheads.heads.inputs import Questions, Samples
from flexheads.heads.labels import InputShape, check_whole_numbers
from flexheads.heads.losses import IGNORED
from flexheads.heads.outputs import head_output
from flexheads.heads.source import Source
from flexheads.heads.text import RowText, Token


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class QuestionAnsweringConfig(LabelledConfig):
    """Configuration of `QuestionAnsweringHead`; the two outputs are start and end.

    Attributes:
        scaled: Whether it reads the hidden states as language-model heads do; makes a difference
            only for architectures that scale them, and there the `adapters` library does.
        unanswerable: Whether a text may lack the answer (SQuAD 2.0, arXiv:1806.03822). Start and
            end are the first token then, in labels too.
        null_threshold: How much larger the score of no answer has to be than that of the best one,
            as a difference of logits, so that there is none.
    """

    num_labels: int = 2
    scaled: bool = True
    unanswerable: bool = False
    null_threshold: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_labels != 2:
            raise ConfigError(
                f"A question-answering head scores start and end, so num_labels is 2, "
                f"not {self.num_labels}."
            )
        if not isinstance(self.unanswerable, bool):
            raise ConfigError(f"unanswerable={self.unanswerable!r} should be True or False.")
        number = self.null_threshold
        if type(number) not in (int, float) or not math.isfinite(number):
            raise ConfigError(f"null_threshold={number!r} should be a number.")


class QuestionAnsweringHead(FeedForwardHead):
    """Scores every token as start and end of the answer; each ``(batch, sequence)``."""

    head_type = "question_answering"
    config_class = QuestionAnsweringConfig
    label_names = ("start_positions", "end_positions")
    samples: ClassVar[Samples] = Questions()

    def read(self, features: Features) -> Tensor:
        return features.scaled if self.config.scaled else features.hidden

    def check_labels(self, labels: Mapping[str, Any], shape: InputShape) -> None:
        given = {name: labels[name] for name in self.label_names if labels.get(name) is not None}
        for name, positions in given.items():
            _check_positions(f"{name} of head {self.name!r}", positions, shape)
        if len(given) == 1:
            missing = next(name for name in self.label_names if name not in given)
            raise LabelError(f"{next(iter(given))} of head {self.name!r} need {missing} beside.")
        if len(given) == 2 and not torch.compiler.is_compiling():
            starts, ends = (positions.reshape(-1) for positions in given.values())
            wrong = (ends < starts) & (ends != IGNORED)
            if shape.length is not None:
                wrong &= starts < shape.length
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise LabelError(
                    f"The answer of row {row} for head {self.name!r} ends at {int(ends[row])}, "
                    f"before it starts at {int(starts[row])}."
                )

    def finish(self, scores: Tensor, features: Features, **labels: Any) -> Any:
        """See `FeedForwardHead.finish`; labels are ``start_positions``, ``end_positions``.

        Both are ``(batch,)``. Positions beyond the sequence, and -100, do not count.
        """
        start, end = scores.unbind(dim=-1)
        starts, ends, loss = labels.get("start_positions"), labels.get("end_positions"), None
        if starts is not None and ends is not None:
            loss = (self._position_loss(start, starts) + self._position_loss(end, ends)) / 2
        return head_output(
            QuestionAnsweringModelOutput,
            features.output,
            loss=loss,
            start_logits=start.contiguous(),
            end_logits=end.contiguous(),
        )

    def _position_loss(self, logits: Tensor, positions: Tensor) -> Tensor:
        positions = positions.reshape(-1)
        nowhere = (positions >= logits.shape[1]) | (positions == IGNORED)
        return self.loss(logits, positions.clamp(min=0).masked_fill(nowhere, IGNORED))

    def decode(  # type: ignore[override]  # its own options
        self,
        output: Any,
        source: Source | None = None,
        *,
        top_k: int | None = None,
        max_answer_length: int = 15,
        align_to_words: bool = True,
        part: int = 1,
    ) -> list[Any]:
        """The best answers of each row, found by an exhaustive search over its spans.

        The score of a span is the probability of its start times that of its end. Where answers
        grow to whole words, the scores of spans that become the same are summed up. An answer is
        never in the question.

        Args:
            output: What `forward` returned.
            source: The inputs, with texts, offsets and sequence ids.
            top_k: How many answers at most; None gives the best one by itself, not in a list.
            max_answer_length: Length of an answer in tokens.
            align_to_words: Whether answers grow to whole words, where the source has word ids.
            part: The number of the text of a pair that holds the answer; the other one asks.

        Returns:
            For each row ``{"answer", "score", "start", "end"}``, or a list of such. Start and end
            are characters of the text. The empty answer says that the text holds none; only a head
            with ``unanswerable=True`` says so.

        Raises:
            UnsupportedError: If the source lacks what is needed.
            ConfigError: If a number is smaller than 1.
        """
        count = 1 if top_k is None else top_k
        for name, number in (("top_k", count), ("max_answer_length", max_answer_length)):
            if number < 1:
                raise ConfigError(f"{name}={number} should be at least 1.")
        found: list[Any] = []
        for row in range(output.start_logits.shape[0]):
            text = RowText(source, row, f"Decoding head {self.name!r}")
            own = [token for token in text.tokens if token.part == part]
            logits = torch.stack([output.start_logits[row], output.end_logits[row]]).detach()
            how = (max_answer_length, align_to_words, self.config.unanswerable)
            search = _Search(text, own, logits.float().cpu(), *how)
            answers = self._ranked(search, count)
            found.append(answers[0] if top_k is None else answers)
        return found

    def _ranked(self, search: _Search, count: int) -> list[dict[str, Any]]:
        """The answers, best first; an empty one stands for none."""
        null = {"answer": "", "score": search.null, "start": 0, "end": 0}
        answers = [(math.log(a["score"] or 1e-45), a) for a in search.answers(count)]
        if self.config.unanswerable or not answers:
            score = math.log(search.null or 1e-45) - self.config.null_threshold
            answers.append((score, null if self.config.unanswerable else {**null, "score": 0.0}))
        answers.sort(key=lambda scored: -scored[0])
        return [answer for _, answer in answers[:count]]


def _check_positions(where: str, positions: Any, shape: InputShape) -> None:
    check_whole_numbers(where, positions, [(shape.rows,), (shape.rows, 1)])
    if torch.compiler.is_compiling():
        return
    wrong = positions[(positions < 0) & (positions != IGNORED)]
    if wrong.numel():
        raise LabelError(
            f"{where} hold {int(wrong[0])}. Positions are counted from 0, which is also where "
            f"there is no answer; {IGNORED} does not count, nor does what is beyond the sequence."
        )


class _Search:
    """The spans of one row, and the score of each.

    Args:
        text: The row's text.
        tokens: The tokens that an answer can hold.
        logits: Of start and end, ``(2, sequence)``.
        longest: The longest answer, in tokens.
        align: Whether answers grow to whole words.
        null: Whether there may be no answer.
    """

    def __init__(
        self,
        text: RowText,
        tokens: Sequence[Token],
        logits: Tensor,
        longest: int,
        align: bool,
        null: bool,
    ) -> None:
        self.text, self.tokens, self.longest, self.align = text, tokens, longest, align
        positions = [token.index for token in tokens]
        if null or all(token.index != text.first for token in text.tokens):
            positions = list({text.first, *positions})  # it is the special token of no answer
        shares = torch.full_like(logits, 0.0)
        shares[:, positions] = logits[:, positions].softmax(dim=-1)
        self.null = float(shares[:, text.first].prod())
        self.shares = shares[:, [token.index for token in tokens]]

    def answers(self, count: int) -> list[dict[str, Any]]:
        """The best answers, at most `count`; spans that become the same are one."""
        start, end = self.shares
        spans = torch.ones(len(start), len(end), dtype=torch.bool).triu().tril(self.longest - 1)
        scores = torch.where(spans, start.unsqueeze(1) * end, 0.0)
        units = self._units()
        number = torch.tensor([n for n, unit in enumerate(units) for _ in unit], dtype=torch.long)
        scores = _by_unit(scores, number, len(units))
        possible = _by_unit(spans.float(), number, len(units)) > 0
        scores = scores.masked_fill(~possible, -1.0).flatten()
        best = scores.topk(min(count, int(possible.sum())))
        return [
            self._answer(score, *(units[n] for n in divmod(span, len(units))))
            for score, span in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def _units(self) -> list[list[Token]]:
        """What answers begin and end with: words, or tokens."""
        known = self.align and all(token.word is not None for token in self.tokens)
        groups = itertools.groupby(self.tokens, lambda t: t.word if known else t.index)
        return [list(tokens) for _, tokens in groups]

    def _answer(self, score: float, first: list[Token], last: list[Token]) -> dict[str, Any]:
        piece = self.text.piece(first[0].part, first[0].start, last[-1].end)
        return {
            "answer": piece["word"],
            "score": score,
            "start": piece["start"],
            "end": piece["end"],
        }


def _by_unit(spans: Tensor, number: Tensor, count: int) -> Tensor:
    """Values of spans, ``(tokens, tokens)``, summed up by the units where they begin and end."""
    rows = spans.new_zeros(count, spans.shape[1]).index_add_(0, number, spans)
    return rows.new_zeros(count, count).index_add_(1, number, rows)
