"""Checks of labels before any compute is spent: their kind, their shape, their range."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from flexheads.errors import LabelError
from flexheads.heads.losses import IGNORED

Shape = tuple[int | None, ...]
"""Expected sizes; None is any."""


@dataclasses.dataclass(frozen=True)
class InputShape:
    """The shape of the inputs that labels belong to.

    Attributes:
        rows: Rows that the head sees; with several choices per example, each is a row.
        length: Length of the sequence, or None where the model itself decides it.
        choices: Choices per example, where the input had that dimension.
    """

    rows: int
    length: int | None = None
    choices: int | None = None


def check_indices(where: str, labels: Tensor, count: int, shapes: Sequence[Shape]) -> None:
    """Refuses labels that are no class numbers below `count`.

    Args:
        where: What to call them, for example ``"labels of head 'ner'"``.
        labels: The labels; -100 does not count.
        count: Number of classes.
        shapes: The shapes that are right.

    Raises:
        LabelError: If the dtype, the shape or a value is wrong.
    """
    check_whole_numbers(where, labels, shapes)
    if torch.compiler.is_compiling() or not labels.numel():
        return
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= count))]
    if wrong.numel():
        raise LabelError(
            f"{where} hold {int(wrong[0])}, but they can be 0 to {count - 1}, or {IGNORED} where "
            "nothing counts."
        )


def check_whole_numbers(where: str, labels: Tensor, shapes: Sequence[Shape]) -> None:
    """Refuses labels that are no whole numbers, whatever their values.

    Raises:
        LabelError: If the dtype or the shape is wrong.
    """
    check_shape(where, labels, shapes)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise LabelError(f"{where} are {labels.dtype}; they should be whole numbers.")


def check_numbers(where: str, labels: Tensor, shapes: Sequence[Shape]) -> None:
    """Refuses labels that are no real numbers.

    Raises:
        LabelError: If the dtype or the shape is wrong, or a value is no number.
    """
    check_shape(where, labels, shapes)
    if labels.is_complex():
        raise LabelError(f"{where} are {labels.dtype}; they should be real numbers.")
    if torch.compiler.is_compiling() or not labels.is_floating_point():
        return
    if not bool(torch.isfinite(labels).all()):
        raise LabelError(f"{where} hold a value that is no finite number.")


def check_shares(where: str, labels: Tensor, shapes: Sequence[Shape]) -> None:
    """Refuses labels that are not each from 0 to 1.

    Raises:
        LabelError: If the shape or a value is wrong.
    """
    check_numbers(where, labels, shapes)
    if torch.compiler.is_compiling() or not labels.numel() or labels.dtype == torch.bool:
        return
    low, high = labels.aminmax()
    if float(low) < 0 or float(high) > 1:
        raise LabelError(f"{where} hold {float(low):g} to {float(high):g}; each is from 0 to 1.")


def check_shape(where: str, labels: Tensor, shapes: Sequence[Shape]) -> None:
    """Refuses labels of a shape that none of `shapes` allows.

    Raises:
        LabelError: If so, or if they are no tensor.
    """
    if not isinstance(labels, Tensor):
        raise LabelError(f"{where} are {type(labels).__name__}, and should be a tensor.")
    given = tuple(labels.shape)
    if not any(_fits(given, shape) for shape in shapes):
        wanted = " or ".join(
            "(" + ", ".join("any" if n is None else str(n) for n in shape) + ")" for shape in shapes
        )
        raise LabelError(f"{where} have shape {given}, and should have {wanted}.")


def _fits(given: tuple[int, ...], shape: Shape) -> bool:
    return len(given) == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(given, shape, strict=True)
    )
