"""Where the tokens of a row are in its text: what decoding of tokens and spans needs."""

from __future__ import annotations

import dataclasses
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
        self._source, self._row = source, row
        self.tokens = [
            Token(index, start, end, part, self._word(index))
            for index, (start, end) in enumerate(source.offsets[row].tolist())
            if (part := self._part(index, start < end)) is not None and self._is_real(index)
        ]

    @property
    def first(self) -> int:
        """The first position that is no padding."""
        length = 0 if self._source.offsets is None else self._source.offsets.shape[1]
        return next((index for index in range(length) if self._is_real(index)), 0)

    def piece(self, part: int, start: int, end: int) -> dict[str, Any]:
        """A piece of a text without spaces around it: ``{"word", "start", "end"}``."""
        text = self._texts if isinstance(self._texts, str) else self._texts[part]
        word = text[start:end]
        begin = start + len(word) - len(word.lstrip())
        word = word.strip()
        return {"word": word, "start": begin, "end": begin + len(word)}

    def _is_real(self, index: int) -> bool:
        mask = self._source.attention_mask
        return mask is None or bool(mask[self._row, index])

    def _word(self, index: int) -> int | None:
        words = self._source.word_ids
        return None if words is None else words[self._row][index]

    def _part(self, index: int, has_text: bool) -> int | None:
        """The text of a token; None for a special token."""
        if self._source.sequence_ids is not None:
            return self._source.sequence_ids[self._row][index]
        special = self._word(index) is None if self._source.word_ids is not None else not has_text
        return None if special else 0
