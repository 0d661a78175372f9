"""What low-rank parts add to what a projection has computed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def plus_product(output: Tensor, inner: Tensor, up: Tensor, scaling: float) -> Tensor:
    """``output + scaling * inner up'``, in the type of the first.

    It is one operation on a CPU; elsewhere the views that this takes cost more than they save.

    Args:
        output: ``(..., out)``.
        inner: ``(..., r)``.
        up: ``(out, r)``.
        scaling: The factor.
    """
    if output.is_cpu and inner.dtype == output.dtype:
        flat = torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), up.t(), alpha=scaling)
        return flat.view_as(output)
    return plus(output, functional.linear(inner, up), scaling)


def plus(output: Tensor, product: Tensor, scaling: float) -> Tensor:
    """``output + scaling * product``, in the type of the first."""
    if product.dtype == output.dtype:
        return torch.add(output, product, alpha=scaling)
    return output + (product * scaling).to(output.dtype)
