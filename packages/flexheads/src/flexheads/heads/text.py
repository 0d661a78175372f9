"""Where the tokens of a row are in its text: what decoding of tokens and spans needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from flexheads.errors import UnsupportedError
from flexheads.heads.source import Source


@dataclasses.dataclass(frozen=True)
class Token:
    """A token that stands for a piece of text.

    Attributes:
        index: Its position in the row.
        start, end: Its place in its text, in characters.
        part: The number of its text in the row, 0 where there is one text alone.
        word: The number of its word, where that is known.
    """

    index: int
    start: int
    end: int
    part: int
    word: int | None


class RowText:
    """The tokens of one row that stand for text, and what they stand for.

    Padding and special tokens are left out.

    Args:
        source: The inputs as people know them.
        row: The number of the row.
        doing: Who asks, for the message.

    Raises:
        UnsupportedError: If the source lacks the texts or the offsets.
    """

    def __init__(self, source: Source | None, row: int, doing: str) -> None:
        if source is None or source.texts is None or source.offsets is None:
            raise UnsupportedError(
                f"{doing} needs a source with the texts, and with the offsets of their tokens; a "
                "fast tokenizer gives them with return_offsets_mapping=True."
            )
        self._texts: Any = source.texts[row]
        places = source.offsets[row].tolist()
        mask = source.attention_mask
        self._real = [1] * len(places) if mask is None else mask[row].tolist()
        words = [None] * len(places) if source.word_ids is None else source.word_ids[row]
        parts = _parts(source, row, places)
        self.tokens = [
            Token(index, start, end, part, words[index])
            for index, ((start, end), part) in enumerate(zip(places, parts, strict=True))
            if part is not None and self._real[index]
        ]

    @property
    def first(self) -> int:
        """The first position that is no padding."""
        return next((index for index, real in enumerate(self._real) if real), 0)

    def piece(self, part: int, start: int, end: int) -> dict[str, Any]:
        """A piece of a text without spaces around it: ``{"word", "start", "end"}``."""
        text = self._texts if isinstance(self._texts, str) else self._texts[part]
        word = text[start:end]
        begin = start + len(word) - len(word.lstrip())
        word = word.strip()
        return {"word": word, "start": begin, "end": begin + len(word)}


def _parts(source: Source, row: int, places: Sequence[tuple[int, int]]) -> Sequence[int | None]:
    """The number of each token's text; None for a special token."""
    if source.sequence_ids is not None:
        return source.sequence_ids[row]
    if source.word_ids is not None:
        return [None if word is None else 0 for word in source.word_ids[row]]
    return [0 if start < end else None for start, end in places]
