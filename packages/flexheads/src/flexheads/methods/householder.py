"""Matrices with orthonormal rows, from as many free numbers as they have entries."""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal_rows(weight: Tensor) -> Tensor:
    """A matrix with orthonormal rows, as a product of Householder reflections.

    Row ``i`` of `weight` holds reflection ``H_i = I - 2 v v^T / (v^T v)``: ``v`` is zero before
    entry ``i``, one there, and what the row holds behind it. The result is the first rows of
    ``(H_1 ... H_r)^T``, each with the sign of its entry ``i`` (Golub and Van Loan, Matrix
    Computations, 5.1.6). Entries before ``i`` have no meaning.

    Args:
        weight: Any matrix ``(r, width)`` with ``r < width``.

    Returns:
        ``(r, width)``, in single precision at least, which the reflections need.
    """
    precise = weight if weight.dtype == torch.float64 else weight.float()
    vectors = precise.mT.tril(-1)
    factors = 2.0 / (1.0 + vectors.square().sum(dim=0))
    columns = torch.linalg.householder_product(vectors, factors)
    rows: Tensor = (columns * signs(precise)).mT
    return rows


def signs(weight: Tensor) -> Tensor:
    """The sign of each row of `orthonormal_rows`, ``(r,)``."""
    diagonal = weight.diagonal()
    return torch.where(diagonal < 0, -torch.ones_like(diagonal), torch.ones_like(diagonal))


@torch.no_grad()
def reflections(rows: Tensor) -> Tensor:
    """The inverse of `orthonormal_rows`: the same shape, with zeros where nothing has a meaning.

    Args:
        rows: A matrix with orthonormal rows, ``(r, width)`` with ``r < width``.
    """
    precise = rows if rows.dtype == torch.float64 else rows.float()
    vectors, factors = torch.geqrf(precise.mT)
    weight = vectors.tril(-1).mT.contiguous()
    # A reflection that need not do anything is left out there, but flips its entry here.
    flips = torch.where(factors == 0, -torch.ones_like(factors), torch.ones_like(factors))
    weight.diagonal().copy_(signs(vectors.mT) * flips)
    return weight
