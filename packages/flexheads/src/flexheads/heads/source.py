"""Where the rows of an output come from: what decoding needs beside the scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The inputs of a batch as people know them; everything may be absent.

    Attributes:
        texts: One text for each row, or a pair of texts.
        input_ids: ``(batch, sequence)``.
        attention_mask: ``(batch, sequence)``; 0 is padding.
        offsets: ``(batch, sequence, 2)``, begin and end of each token in its text, in characters.
        word_ids: For each row the word of each token, or None for a special token.
        sequence_ids: For each row the number of each token's text, or None for a special token.
        tokenizer: The tokenizer.
    """

    texts: Sequence[Any] | None = None
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    offsets: Tensor | None = None
    word_ids: Sequence[Sequence[int | None]] | None = None
    sequence_ids: Sequence[Sequence[int | None]] | None = None
    tokenizer: Any = None
