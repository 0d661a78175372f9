"""What language-model heads say: the tokens at masks, the tokens that follow, generated texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexheads.errors import UnsupportedError
from flexheads.heads.source import Source


def filled_masks(logits: Tensor, source: Source | None, top_k: int) -> list[Any]:
    """The likeliest tokens at each mask, in the form of transformers' fill-mask pipeline.

    Args:
        logits: ``(batch, sequence, vocabulary)``.
        source: ``input_ids`` and ``tokenizer``.
        top_k: How many for each mask.

    Raises:
        UnsupportedError: If one of them is missing, or a row has no mask.
    """
    tokenizer = _tokenizer(source)
    if source is None or source.input_ids is None or tokenizer.mask_token_id is None:
        raise UnsupportedError("Finding masks needs input_ids, and a tokenizer with a mask token.")
    found: list[Any] = []
    for row, ids in enumerate(source.input_ids):
        masks = (ids == tokenizer.mask_token_id).nonzero().flatten().tolist()
        if not masks:
            raise UnsupportedError(f"Row {row} has no {tokenizer.mask_token} to fill.")
        filled = [
            [
                {**candidate, "sequence": _with(ids, place, candidate, tokenizer, len(masks) == 1)}
                for candidate in _candidates(logits[row, place], tokenizer, top_k)
            ]
            for place in masks
        ]
        found.append(filled if len(filled) > 1 else filled[0])
    return found


def likely_next(logits: Tensor, source: Source | None, top_k: int) -> list[Any]:
    """The likeliest tokens behind the last position of each row that is no padding.

    Args:
        logits: ``(batch, positions, vocabulary)``.
        source: The tokenizer, and the mask where there is padding.
        top_k: How many.

    Raises:
        UnsupportedError: If there is no tokenizer.
    """
    tokenizer, last = _tokenizer(source), [logits.shape[1] - 1] * logits.shape[0]
    mask = None if source is None else source.attention_mask
    if mask is not None and mask.shape == logits.shape[:2]:
        ranks = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        last = (mask.ne(0) * ranks).argmax(dim=1).tolist()
    return [
        _candidates(row[place], tokenizer, top_k) for row, place in zip(logits, last, strict=True)
    ]


def written_texts(
    output: Any,
    source: Source | None,
    *,
    return_full_text: bool = True,
    skip_special_tokens: bool = True,
) -> list[dict[str, str]]:
    """The texts of generated sequences, in the form of transformers' pipelines.

    Args:
        output: Token ids ``(sequences, length)``, or what holds them as ``sequences``.
        source: The tokenizer, and the prompts' ``input_ids`` where they are to be left out.
        return_full_text: Whether the prompt is a part of the text.
        skip_special_tokens: Leaves out tokens such as padding.

    Raises:
        UnsupportedError: If something of `source` is missing.
    """
    tokenizer = _tokenizer(source)
    ids = output["sequences"] if isinstance(output, Mapping) else output
    if not return_full_text:
        if source is None or source.input_ids is None:
            raise UnsupportedError("Leaving out the prompts needs their input_ids.")
        ids = ids[:, source.input_ids.shape[1] :]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens)
    return [{"generated_text": text} for text in texts]


def _tokenizer(source: Source | None) -> Any:
    if source is None or source.tokenizer is None:
        raise UnsupportedError("Decoding tokens needs the tokenizer: Source(tokenizer=...).")
    return source.tokenizer


def _candidates(logits: Tensor, tokenizer: Any, top_k: int) -> list[dict[str, Any]]:
    scores, tokens = logits.float().softmax(dim=-1).topk(min(top_k, logits.shape[-1]))
    return [
        {"score": score, "token": token, "token_str": tokenizer.decode([token])}
        for score, token in zip(scores.tolist(), tokens.tolist(), strict=True)
    ]


def _with(
    ids: Tensor, place: int, candidate: Mapping[str, Any], tokenizer: Any, alone: bool
) -> str:
    """A row with a token in place of its mask; where there are more masks, they stay to be seen."""
    filled = ids.clone()
    filled[place] = candidate["token"]
    filled = filled[filled != tokenizer.pad_token_id]
    text: str = tokenizer.decode(filled, skip_special_tokens=alone)
    return text
