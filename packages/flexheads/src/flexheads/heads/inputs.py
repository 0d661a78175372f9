"""What the samples of a type look like to a person, and the batches that are made of them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from flexheads.errors import ConfigError, UnsupportedError
from flexheads.heads.rows import Row, in_joined, pad_rows, source_of
from flexheads.heads.source import Source

Long = Literal["cut", "join", "best", "refuse"]
"""What happens to a sample that is longer than the model reads: it is cut at its end; or it becomes
windows that overlap, whose scores are joined into one row, or of whose results the best one counts,
for types that decode with ``top_k``; or it is an error."""

_TOKENIZING = threading.Lock()
"""Fast tokenizers keep how they truncate, so that only one call may run at a time."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What the model reads at once of one sample.

    Attributes:
        sample: Number of the sample.
        content: Its rows, or the image or sound itself.
        length: How long it is, for batches of about one length.
        parts: In how many pieces the sample is read.
        shared: How many tokens of the text two of these share.
    """

    sample: int
    content: Any
    length: int = 0
    parts: int = 1
    shared: int = 0

    @property
    def rows(self) -> int:
        """How many rows of a batch it is."""
        return len(self.content) if isinstance(self.content, tuple) else 1


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much a model reads at once.

    Attributes:
        length: Tokens of a row; None is any number.
        stride: Tokens that two windows share; None is 128, or half of a window if that is less.
    """

    length: int | None = None
    stride: int | None = None


class Samples:
    """How samples become batches; head types name one as their `samples`.

    Attributes:
        looks: What a sample looks like, for messages.
        long: What happens to long samples.
    """

    looks: str = ""
    long: Long = "cut"

    def pieces(self, processor: Any, samples: Sequence[Any], limits: Limits) -> list[Piece]:
        """What the model reads of each sample; several pieces where one is too long.

        Raises:
            ConfigError: If a sample looks otherwise.
        """
        raise NotImplementedError

    def batch(self, processor: Any, pieces: Sequence[Piece]) -> tuple[dict[str, Any], Source]:
        """The model's inputs for some pieces, and the same as people know them."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Texts(Samples):
    """A text, a list of its words, or a tuple of two texts.

    Args:
        long: What happens to long samples.
        offsets: Whether decoding needs to know where each token stands in its text.
        truncation: What is cut, as tokenizers name it.
    """

    long: Long = "cut"
    offsets: bool = False
    truncation: str = "longest_first"
    looks = "a text, a list of words, or a tuple of two texts"

    def read(self, sample: Any) -> tuple[Any, Any]:
        """The first and the second text; the first may be a list of words.

        Raises:
            ValueError: If it is no such sample.
        """
        if isinstance(sample, Mapping):
            sample = (sample["text"], sample.get("text_pair"))
        first, second = sample if isinstance(sample, tuple) else (sample, None)
        if not isinstance(first, list):
            return _text(first), None if second is None else _text(second)
        if second is not None:
            raise ValueError(sample)
        return [_text(word) for word in first], None

    def pieces(self, processor: Any, samples: Sequence[Any], limits: Limits) -> list[Piece]:
        fast = bool(getattr(processor, "is_fast", False))
        if not fast and (self.offsets or self.long in ("join", "best")):
            raise UnsupportedError(
                f"{type(processor).__name__} does not tell where its tokens stand in the text, and "
                "this type of head needs that. Give a fast tokenizer (is_fast is True)."
            )
        read = self._read_all(samples)
        found = []
        for form in dict.fromkeys(map(_form, read)):  # a tokenizer takes one form at a time
            own = [number for number, sample in enumerate(read) if _form(sample) == form]
            encoded, shared = self._encode(processor, [read[n] for n in own], limits, fast)
            of = list(encoded.get("overflow_to_sample_mapping", range(len(own))))
            for index, which in enumerate(of):
                row = self._row(encoded, index, read[own[which]])
                self._check(row, limits)
                found.append(Piece(own[which], (row,), len(row), of.count(which), shared))
        return sorted(found, key=lambda piece: piece.sample)

    def batch(self, processor: Any, pieces: Sequence[Piece]) -> tuple[dict[str, Any], Source]:
        rows = [row for piece in pieces for row in piece.content]
        inputs = pad_rows(rows, processor)
        return inputs, source_of(rows, inputs, processor)

    def _read_all(self, samples: Sequence[Any]) -> list[tuple[Any, Any]]:
        found = []
        for number, sample in enumerate(samples):
            try:
                found.append(self.read(sample))
            except (TypeError, ValueError, KeyError) as error:
                raise ConfigError(
                    f"Sample {number} is {repr(sample)[:80]}, and should be {self.looks}."
                ) from error
        return found

    def _encode(
        self, tokenizer: Any, read: Sequence[tuple[Any, Any]], limits: Limits, fast: bool
    ) -> tuple[Any, int]:
        """What a tokenizer makes of samples of one form, and how many tokens windows share."""
        firsts, pairs, shared = [first for first, _ in read], read[0][1] is not None, 0
        arguments: dict[str, Any] = {"is_split_into_words": isinstance(firsts[0], list)}
        arguments["return_attention_mask"] = True  # not every tokenizer does it unasked
        if pairs:
            arguments["text_pair"] = [second for _, second in read]
        if limits.length is not None and self.long != "refuse":
            arguments |= {"truncation": self.truncation if pairs else True}
            arguments["max_length"] = limits.length
            if self.long in ("join", "best"):
                shared = self._stride(tokenizer, firsts if pairs else [], limits)
                arguments |= {"stride": shared, "return_overflowing_tokens": True}
        if fast:
            arguments["return_offsets_mapping"] = True
        with _TOKENIZING:
            return tokenizer(firsts, padding=False, verbose=False, **arguments), shared

    def _check(self, row: Row, limits: Limits) -> None:
        shown = str(row.text)[:60]
        if not len(row):
            raise ConfigError(f"The sample {shown!r} has no tokens; leave it out.")
        if self.long == "refuse" and len(row) > (limits.length or len(row)):
            raise ConfigError(
                f"The sample {shown!r} has {len(row)} tokens, and the model reads {limits.length} "
                "at once. This type of head has to see a sample as a whole; make it shorter."
            )

    def _stride(self, tokenizer: Any, firsts: Sequence[Any], limits: Limits) -> int:
        """How many tokens windows share; `firsts` are texts that every window repeats."""
        assert limits.length is not None
        room = limits.length - tokenizer.num_special_tokens_to_add(pair=bool(firsts))
        if firsts:
            with _TOKENIZING:
                ids = tokenizer(
                    list(firsts), add_special_tokens=False, padding=False, verbose=False
                )["input_ids"]
            room -= max(map(len, ids))
        stride = min(128, max(room, 0) // 2) if limits.stride is None else limits.stride
        if not 0 <= stride < room:
            raise ConfigError(
                f"Of the {limits.length} tokens that are read at once, special tokens and the "
                f"longest question leave {room} for the text, so that windows cannot share "
                f"stride={stride} of them. Choose a larger max_length or a smaller stride."
            )
        return stride

    def _row(self, encoded: Any, index: int, read: tuple[Any, Any]) -> Row:
        inputs = {
            name: encoded[name][index]
            for name in encoded
            if name not in ("offset_mapping", "overflow_to_sample_mapping")
        }
        first, second = read
        text = " ".join(first) if isinstance(first, list) else first
        text = text if second is None else (text, second)
        if "offset_mapping" not in encoded:
            return Row(inputs=inputs, text=text)
        offsets, words = encoded["offset_mapping"][index], encoded.word_ids(index)
        if isinstance(first, list):
            offsets = in_joined(offsets, words, first)
        return Row(
            inputs=inputs,
            text=text,
            offsets=[(int(begin), int(end)) for begin, end in offsets],
            word_ids=words,
            sequence_ids=encoded.sequence_ids(index),
        )


@dataclasses.dataclass(frozen=True)
class Questions(Texts):
    """A question and the text that answers it; the text is read in windows where it is long."""

    long: Long = "best"
    offsets: bool = True
    truncation: str = "only_second"
    looks = 'a tuple (question, context), or {"question": ..., "context": ...}'

    def read(self, sample: Any) -> tuple[Any, Any]:
        if isinstance(sample, Mapping):
            sample = (sample["question"], sample["context"])
        if not isinstance(sample, tuple):
            raise ValueError(sample)
        question, context = sample
        return _text(question), _text(context)


_TEXTS = Texts()


@dataclasses.dataclass(frozen=True)
class Choices(Texts):
    """A text and what could follow it; every choice is a row."""

    looks = 'a tuple (prompt, [choice, ...]), or {"prompt": ..., "choices": [...]}'

    def pieces(self, processor: Any, samples: Sequence[Any], limits: Limits) -> list[Piece]:
        read = self._read_all(samples)
        pairs = [(prompt, choice) for prompt, choices in read for choice in choices]
        rows = [piece.content[0] for piece in _TEXTS.pieces(processor, pairs, limits)]
        found = []
        for number, (_, choices) in enumerate(read):
            own, rows = rows[: len(choices)], rows[len(choices) :]
            named = (
                dataclasses.replace(row, text=choice)
                for row, choice in zip(own, choices, strict=True)
            )
            found.append(Piece(number, tuple(named), max(map(len, own))))
        return found

    def read(self, sample: Any) -> tuple[Any, Any]:
        if isinstance(sample, Mapping):
            sample = (sample["prompt"], sample["choices"])
        prompt, choices = sample
        if isinstance(choices, str) or not choices:
            raise ValueError(sample)
        return _text(prompt), [_text(choice) for choice in choices]

    def batch(self, processor: Any, pieces: Sequence[Piece]) -> tuple[dict[str, Any], Source]:
        inputs, source = super().batch(processor, pieces)
        choices = len(pieces[0].content)
        return {name: t.view(len(pieces), choices, -1) for name, t in inputs.items()}, source


@dataclasses.dataclass(frozen=True)
class TextsOrChoices(Choices):
    """Texts by themselves, or choices to be compared; one of the two in a call."""

    looks = f"{Texts.looks}; or all of them {Choices.looks}"

    def pieces(self, processor: Any, samples: Sequence[Any], limits: Limits) -> list[Piece]:
        if any(map(_has_choices, samples)):
            return super().pieces(processor, samples, limits)
        return _TEXTS.pieces(processor, samples, limits)

    def batch(self, processor: Any, pieces: Sequence[Piece]) -> tuple[dict[str, Any], Source]:
        if pieces[0].rows > 1:
            return super().batch(processor, pieces)
        return _TEXTS.batch(processor, pieces)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(value)
    return value


def _has_choices(sample: Any) -> bool:
    by_name = isinstance(sample, Mapping) and "choices" in sample
    return by_name or (isinstance(sample, tuple) and not isinstance(sample[-1], str))


def _form(read: tuple[Any, Any]) -> tuple[bool, bool]:
    return isinstance(read[0], list), read[1] is not None
