"""Rows of tokens before they are a batch, and the batch that they become."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flexheads.heads.source import Source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a batch before it is padded; all lists have one item for each token.

    Attributes:
        inputs: Arguments of the model.
        text: What it was made of.
        offsets: Begin and end in the text, in characters; None where the tokenizer cannot tell.
        word_ids: The word; None for a special token.
        sequence_ids: The number of the text; None for a special token.
    """

    inputs: Mapping[str, Sequence[int]]
    text: Any
    offsets: Sequence[tuple[int, int]] | None = None
    word_ids: Sequence[int | None] | None = None
    sequence_ids: Sequence[int | None] | None = None

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


def pad_rows(rows: Sequence[Row], tokenizer: Any) -> dict[str, Tensor]:
    """The inputs of a batch, ``(rows, longest)``.

    Padding is on the right whatever the tokenizer prefers, so that tokens keep their positions, and
    what reads from left to right sees it nowhere. A tokenizer without a token for it needs none,
    because the mask tells.
    """
    fill = {
        "input_ids": getattr(tokenizer, "pad_token_id", None) or 0,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", None) or 0,
    }
    return {
        name: pad_sequence(
            [torch.tensor(row.inputs[name], dtype=torch.long) for row in rows],
            batch_first=True,
            padding_value=fill.get(name, 0),
        )
        for name in rows[0].inputs
    }


def source_of(rows: Sequence[Row], inputs: Mapping[str, Tensor], tokenizer: Any) -> Source:
    """The rows of a batch as people know them; `inputs` are what `pad_rows` made of them."""
    width = max(map(len, rows))
    common: dict[str, Any] = {
        "texts": [row.text for row in rows],
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs.get("attention_mask"),
        "tokenizer": tokenizer,
    }
    if rows[0].offsets is None:
        return Source(**common)
    return Source(
        **common,
        offsets=pad_sequence([torch.tensor(row.offsets) for row in rows], batch_first=True),
        word_ids=[_padded(row.word_ids or (), width) for row in rows],
        sequence_ids=[_padded(row.sequence_ids or (), width) for row in rows],
    )


def _padded(values: Sequence[int | None], width: int) -> list[int | None]:
    return [*values, *[None] * (width - len(values))]


def in_joined(
    offsets: Sequence[tuple[int, int]], words: Sequence[int | None], texts: Sequence[str]
) -> list[tuple[int, int]]:
    """Offsets inside words as offsets in the words with a space between each two."""
    starts, at = [], 0
    for text in texts:
        starts.append(at)
        at += len(text) + 1
    shifts = [0 if word is None else starts[word] for word in words]
    return [(a + shift, b + shift) for (a, b), shift in zip(offsets, shifts, strict=True)]
