"""One vector for a sequence: where it is read, by the kind of pooling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from flexheads.errors import UnsupportedError

if TYPE_CHECKING:
    from flexheads.heads.features import Features


def pool(features: Features, kind: str) -> Tensor:
    """The vector of each row, ``(batch, hidden)``, of `flexheads.heads.Features`.

    Args:
        features: The features.
        kind: ``first_token``; ``last_token``, the last that is no padding, on whichever side that
            is; ``eos``, the last end-of-sequence token; ``mean`` and ``max`` over all that are no
            padding; ``pooler``, what the model's trained pooler gives; for images ``patch_mean``
            over all but the first position and registers, and ``first_token_and_patch_mean``, both
            in one vector of twice the size.

    Raises:
        UnsupportedError: If the model has no pooler, the tokens that tell where the sequence ends
            were not given, or some row has no end-of-sequence token.
    """
    return _POOLS[kind](features)


def real_positions(features: Features) -> Tensor | None:
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


def real_mean(values: Tensor, real: Tensor | None) -> Tensor:
    """The mean of each row over the positions that are no padding.

    Args:
        values: ``(batch, sequence, any)``.
        real: Which positions are no padding, ``(batch, sequence)``; None is all.
    """
    if real is None:
        return values.mean(dim=1)
    weights = real.to(values.dtype).unsqueeze(-1)
    return (values * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)


def _first_token(features: Features) -> Tensor:
    return features.hidden[:, 0]


def _pooler(features: Features) -> Tensor:
    if features.pooler_output is None:
        raise UnsupportedError(
            "This model has no trained pooler that reads the layer of this head; add the head with "
            "another pooling, or use_pooler=False."
        )
    return features.pooler_output


def _last_token(features: Features) -> Tensor:
    real = real_positions(features)
    return features.hidden[:, -1] if real is None else _last(features.hidden, real)


def _eos(features: Features) -> Tensor:
    return _last(features.hidden, _ends(features))


def _mean(features: Features) -> Tensor:
    return real_mean(features.hidden, real_positions(features))


def _max(features: Features) -> Tensor:
    real, hidden = real_positions(features), features.hidden
    if real is not None:
        hidden = hidden.masked_fill(~real.unsqueeze(-1), torch.finfo(hidden.dtype).min)
    return hidden.amax(dim=1)


def _patch_mean(features: Features) -> Tensor:
    return features.hidden[:, features.patches_from :].mean(dim=1)


def _first_token_and_patch_mean(features: Features) -> Tensor:
    return torch.cat([_first_token(features), _patch_mean(features)], dim=-1)


_POOLS: Mapping[str, Callable[[Features], Tensor]] = {
    "first_token": _first_token,
    "pooler": _pooler,
    "last_token": _last_token,
    "eos": _eos,
    "mean": _mean,
    "max": _max,
    "patch_mean": _patch_mean,
    "first_token_and_patch_mean": _first_token_and_patch_mean,
}

WIDTHS: Mapping[str, int] = {"first_token_and_patch_mean": 2}
"""How many times the hidden size a kind of pooling gives, where it is not once."""


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
