"""One vector for a sequence: where it is read, by the architecture's kind of pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from flexheads.errors import UnsupportedError

if TYPE_CHECKING:
    from flexheads.heads.base import Features


def pool(features: Features) -> Tensor:
    """The vector of each row, ``(batch, hidden)``, of `flexheads.heads.Features`.

    Raises:
        UnsupportedError: If the tokens that tell where the sequence ends were not given, or some
            row has no end-of-sequence token.
    """
    hidden = features.hidden
    if features.pooling == "first_token":
        return hidden[:, 0]
    if features.pooling == "pooler":
        return features.pooled(use_pooler=True)
    if features.pooling == "last_eos":
        return _last(hidden, _ends(features))
    real = _real(features)
    if features.pooling == "last_token":
        return hidden[:, -1] if real is None else _last(hidden, real)
    if real is None:
        return hidden.mean(dim=1)
    weights = real.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


def _real(features: Features) -> Tensor | None:
    """Which positions are no padding, ``(batch, sequence)``; None where nothing tells."""
    mask, ids, length = features.attention_mask, features.input_ids, features.hidden.shape[1]
    if mask is not None and mask.dim() == 2:
        mask = mask != 0
    elif ids is not None and features.pad is not None:
        mask = ids != features.pad
    else:
        return None
    # In a generation step only the last positions are at hand; a prompt puts some in front.
    return functional.pad(mask[:, -length:], (max(0, length - mask.shape[1]), 0), value=True)


def _ends(features: Features) -> Tensor:
    """Which positions hold the end-of-sequence token, ``(batch, sequence)``."""
    ids = features.input_ids
    if ids is None or features.eos is None:
        raise UnsupportedError(
            "This model is pooled at its end-of-sequence token, so it needs input_ids, and an "
            "eos_token_id in its configuration."
        )
    if ids.shape[1] != features.hidden.shape[1]:
        raise UnsupportedError(
            f"This model is pooled where input_ids have their end-of-sequence token, but there are "
            f"{ids.shape[1]} input_ids and {features.hidden.shape[1]} outputs. Leave out "
            "decoder_input_ids for this head."
        )
    ends: Tensor = ids == features.eos
    if not torch.compiler.is_compiling() and not bool(ends.any(dim=1).all()):
        raise UnsupportedError(
            f"Some row has no end-of-sequence token (id {features.eos}), at which this model is "
            "pooled. Append it to every sequence, as the model's own tokenizer does."
        )
    return ends


def _last(hidden: Tensor, where: Tensor) -> Tensor:
    """The hidden state at the last marked position of each row; the last one of all for none.

    Args:
        hidden: ``(batch, sequence, hidden)``.
        where: ``(batch, sequence)``; counted from the end, so what is put in front does not count.
    """
    from_end = where.flip(1).to(torch.uint8).argmax(dim=1)
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, hidden.shape[1] - 1 - from_end]
