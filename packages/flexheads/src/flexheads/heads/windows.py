"""Samples that were read in windows: their scores in one row, or the best of their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flexheads.heads.rows import Row


def join(rows: Sequence[Row], outputs: Sequence[Any], stride: int) -> tuple[Row, Any]:
    """One row, and the output for it, of windows that overlap.

    Where two windows have a token, the one in which it is further from the edge counts.

    Args:
        rows: The windows of one sample, in any order.
        outputs: What the head gave for each, with fields ``(1, tokens, ...)``; others are left out.
        stride: How many tokens of the text two windows share.

    Returns:
        The row of the whole text, with the special tokens around it, and its output.
    """
    order = sorted(range(len(rows)), key=lambda index: _first_offset(rows[index]))
    rows, outputs = [rows[index] for index in order], [outputs[index] for index in order]
    kept = [_kept(row, index, len(rows), stride) for index, row in enumerate(rows)]
    pairs = list(zip(rows, kept, strict=True))

    def gather(field: Any) -> list[Any]:
        return [value for row, part in pairs for value in (field(row) or ())[part]]

    inputs = {
        name: gather(lambda row, name=name: row.inputs[name])
        for name in rows[0].inputs
        if len(rows[0].inputs[name]) == len(rows[0])
    }
    whole = Row(
        inputs=inputs,
        text=rows[0].text,
        offsets=gather(lambda row: row.offsets),
        word_ids=gather(lambda row: row.word_ids),
        sequence_ids=gather(lambda row: row.sequence_ids),
    )
    return whole, _join_outputs(rows, outputs, kept)


def best(results: Sequence[Sequence[Mapping[str, Any]]], count: int) -> list[Mapping[str, Any]]:
    """The best of what a head said of the windows of one sample.

    Args:
        results: For each window mappings with a ``score``, the best first. One whose ``answer`` is
            empty says that the window has none; a sample has none only if no window has one.
        count: How many at most.

    Returns:
        The mappings of all windows, the best first.
    """
    found = [one for result in results for one in result]
    nothing = sorted((one for one in found if _is_empty(one)), key=_score)[:1]
    something = [one for one in found if not _is_empty(one)]
    ranked = _unique(sorted(something, key=_score, reverse=True))
    if all(result and _is_empty(result[0]) for result in results):
        return [*nothing, *ranked][:count]
    behind = sorted([*ranked[1:], *nothing], key=_score, reverse=True)
    return [*ranked[:1], *behind][:count]


def _is_empty(one: Mapping[str, Any]) -> bool:
    return one.get("answer") == ""


def _unique(ranked: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The same place once only, though several windows have it."""
    places: dict[Any, Mapping[str, Any]] = {}
    for one in ranked:
        places.setdefault((one.get("start"), one.get("end"), one.get("answer")), one)
    return list(places.values())


def _score(one: Mapping[str, Any]) -> float:
    return float(one["score"])


def _text_part(row: Row) -> tuple[int, int]:
    """Where the tokens of the text begin and end."""
    real = [at for at, text in enumerate(row.sequence_ids or ()) if text is not None]
    return (real[0], real[-1] + 1) if real else (0, len(row))


def _first_offset(row: Row) -> int:
    return int((row.offsets or [(0, 0)])[_text_part(row)[0]][0])


def _kept(row: Row, index: int, count: int, stride: int) -> slice:
    """The tokens of a window that count: half of what it shares with each neighbour."""
    begin, end = _text_part(row)
    return slice(
        0 if index == 0 else begin + stride - stride // 2,
        len(row) if index == count - 1 else end - stride // 2,
    )


def _join_outputs(rows: Sequence[Row], outputs: Sequence[Any], kept: Sequence[slice]) -> Any:
    def per_token(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == len(rows[0])

    names = [name for name, value in outputs[0].items() if per_token(value)]
    return type(outputs[0])(
        **{
            name: torch.cat([o[name][:, part] for o, part in zip(outputs, kept, strict=True)], 1)
            for name in names
        }
    )
