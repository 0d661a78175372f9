"""Rotations from skew-symmetric matrices, block by block."""

from __future__ import annotations

import torch
from torch import Tensor


def cayley(skew: Tensor) -> Tensor:
    """The Cayley transform ``(I - Q)(I + Q)^-1``, a rotation for every skew-symmetric ``Q``.

    Equation 2 of the BOFT paper (arXiv:2311.06243) with the sign of Q turned, which is a matter of
    naming.

    Args:
        skew: ``(..., size, size)``. What is less than single precision is computed in it.
    """
    wide = skew if skew.dtype in (torch.float32, torch.float64) else skew.float()
    identity = torch.eye(skew.shape[-1], device=skew.device, dtype=wide.dtype).expand_as(wide)
    return torch.linalg.solve(identity + wide, identity - wide, left=False).to(skew.dtype)


def cayley_neumann(skew: Tensor, terms: int) -> Tensor:
    """The Cayley transform of ``-Q`` by a Neumann series, without a matrix inverse.

    ``(I + Q)(I - Q)^-1 = I + 2Q + 2Q^2 + ...``, cut off. The last power counts once, so that the
    result is ``(I + Q)(I + Q + ... + Q^k)``. It is a rotation up to powers that are left out, so
    Q must be small.

    Args:
        skew: ``(..., size, size)``.
        terms: The number of terms, 2 or more. As in PEFT, 2 is ``I + 2Q``, and 3 is the same as 4.
    """
    rotation = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype) + 2 * skew
    if terms == 2:
        return rotation
    power = skew @ skew
    rotation = rotation + 2 * power
    for _ in range(3, terms - 1):
        power = power @ skew
        rotation = rotation + 2 * power
    return rotation + power @ skew


def apply_blocks(hidden: Tensor, blocks: Tensor) -> Tensor:
    """Multiplies hidden states with a block-diagonal matrix, from the right.

    Args:
        hidden: ``(..., width)``.
        blocks: ``(number, size, size)`` with ``number * size`` the width, or ``(1, size, size)``
            for blocks that are all the same.
    """
    cut = hidden.unflatten(-1, (-1, blocks.shape[-1])).unsqueeze(-2)
    return (cut @ blocks.to(hidden.dtype)).squeeze(-2).flatten(-2)


def some(number: int, probability: float, device: torch.device) -> Tensor:
    """Marks a random choice of ``int(probability * number)`` blocks: ``(number, 1, 1)``."""
    chosen = torch.randperm(number, device=device) < int(probability * number)
    return chosen.view(number, 1, 1)
