"""What prompts do to a batch: where they stand in the rows, and tensors with and without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from flexheads.errors import UnsupportedError
from flexheads.sites.base import run_chains
from flexheads.sites.rows import RowMap

Like = Callable[[Tensor, int], Tensor]
"""Makes what stands in the place of a prompt, from a tensor so far and the number of positions."""


class PromptPart(nn.Module):
    """What an adapter has at the prompt site.

    Attributes:
        length: Number of positions.
        after_first: Whether it stands behind the first position instead of before it.
    """

    length: int
    after_first: bool

    def forward(self) -> Tensor:
        """The prompt, ``(length, embedding size)``."""
        raise NotImplementedError


class Layout(NamedTuple):
    """How the rows of one chain lie in a batch whose rows have prompts of any length.

    Attributes:
        steps: The length of each prompt, and whether it stands behind the first position; each
            joins what was left by the one before.
        padding: How many positions are added that nobody sees, so that all rows are of one length.
        padded_first: Whether these stand before the sequence with its prompts, or behind it.
    """

    steps: tuple[tuple[int, bool], ...]
    padding: int = 0
    padded_first: bool = False

    @property
    def length(self) -> int:
        """The positions of all prompts."""
        return sum(length for length, _ in self.steps)

    @property
    def start(self) -> int:
        """Where the sequence with its prompts begins."""
        return self.padding if self.padded_first else 0

    def insert(self, tensor: Tensor, like: Like, dim: int, unseen: float | None = None) -> Tensor:
        """A tensor with something in the place of every prompt.

        Args:
            tensor: The tensor.
            like: Makes what stands there.
            dim: The dimension of positions, counted from the end.
            unseen: What stands where padding is added; None is what `like` makes.
        """
        for length, after_first in self.steps:
            tensor = inserted(tensor, like(tensor, length), after_first, dim)
        if self.padding and unseen is None:
            more = like(tensor, self.padding)
            return torch.cat([more, tensor] if self.padded_first else [tensor, more], dim)
        return self.padded(tensor, dim, unseen or 0.0)

    def padded(self, tensor: Tensor, dim: int, value: float = 0.0) -> Tensor:
        """A tensor with prompts, and what fills its rows up."""
        if not self.padding:
            return tensor
        sides = (self.padding, 0) if self.padded_first else (0, self.padding)
        return functional.pad(tensor, (0, 0) * (-1 - dim) + sides, value=value)

    def cut(self, tensor: Tensor) -> Tensor:
        """A tensor ``(rows, sequence, ...)`` without the positions of prompts and padding."""
        tensor = tensor[:, self.start : tensor.shape[1] - self.padding + self.start]
        for length, after_first in reversed(self.steps):
            if after_first:
                tensor = torch.cat([tensor[:, :1], tensor[:, 1 + length :]], dim=1)
            else:
                tensor = tensor[:, length:]
        return tensor

    def positions(self, positions: Tensor) -> Tensor:
        """Positions ``(..., sequence)`` that count through the prompts."""
        for length, after_first in self.steps:
            own = torch.arange(length, device=positions.device, dtype=positions.dtype)
            own = own.expand(*positions.shape[:-1], -1)
            first, rest = positions[..., :after_first], positions[..., after_first:] + length
            own = own + first + 1 if after_first else own
            positions = torch.cat([first, own, rest], dim=-1)
        return self.padded(positions, -1)


class PromptOp(NamedTuple):
    """What the prompt site does in one plan: each prompt of a chain joins what was left.

    Attributes:
        chains: The prompts of each chain.
        rows: The rows of each chain; None where there is one chain for all.
        layouts: How the rows of each chain lie.
        length: How many positions come to every row.
        ragged: Whether rows lie differently.
    """

    chains: tuple[tuple[PromptPart, ...], ...]
    rows: RowMap | None
    layouts: tuple[Layout, ...]
    length: int
    ragged: bool

    @classmethod
    def of(
        cls, chains: Sequence[Sequence[PromptPart]], rows: RowMap | None, padded_first: bool
    ) -> PromptOp:
        """What the site does with the prompts of some chains.

        Args:
            chains: The prompts of each chain.
            rows: The rows of each chain.
            padded_first: Where rows with shorter prompts are filled up: before them, or behind.
        """
        plain = [Layout(tuple((p.length, p.after_first) for p in chain)) for chain in chains]
        length = max(layout.length for layout in plain)
        layouts = tuple(
            own._replace(padding=length - own.length, padded_first=padded_first) for own in plain
        )
        return cls(tuple(map(tuple, chains)), rows, layouts, length, len(set(layouts)) > 1)

    def join(self, hidden: Tensor) -> Tensor:
        """Embeddings with the prompts of each row in them: ``(batch, sequence, width)``."""
        own = tuple(zip(self.chains, self.layouts, strict=True))
        return run_chains(own, self.rows, _join, hidden)

    def insert(self, tensor: Tensor, like: Like, dim: int, unseen: float | None = None) -> Tensor:
        """A tensor with something in the place of every prompt, see `Layout.insert`."""
        return self._by_layout(lambda own, part: own.insert(part, like, dim, unseen), tensor)

    def cut(self, tensor: Tensor) -> Tensor:
        """A tensor ``(batch, sequence, ...)`` without the positions of prompts."""
        return self._by_layout(Layout.cut, tensor)

    def first(self, hidden: Tensor) -> Tensor:
        """The first position of each row, which may be a prompt's: ``(batch, width)``."""
        return self._by_layout(lambda own, part: part[:, own.start], hidden)

    def mask(self, mask: Tensor) -> Tensor:
        """A mask ``(batch, sequence)`` in which the prompts count."""
        return self.insert(mask, lambda m, length: m.new_ones(m.shape[0], length), -1, 0)

    def tokens(self, mask: Tensor) -> Tensor:
        """A mask ``(batch, sequence)`` in which the prompts do not count."""
        return self.insert(mask, lambda m, length: m.new_zeros(m.shape[0], length), -1)

    def positions(self, positions: Tensor, enters: bool) -> Tensor:
        """Positions ``(rows, sequence)`` that count through the prompts.

        Args:
            positions: Those of the sequence without prompts, for all rows or for each.
            enters: Whether the prompts enter in this call, or are in the cache.
        """

        def moved(own: Layout, part: Tensor) -> Tensor:
            return own.positions(part) if enters else part + own.length

        return self._by_layout(moved, positions)

    def _by_layout(self, change: Callable[[Any, Tensor], Tensor], tensor: Tensor) -> Tensor:
        if not self.ragged:
            return change(self.layouts[0], tensor)
        return run_chains(self.layouts, self.rows, change, tensor)


def _join(own: tuple[Sequence[PromptPart], Layout], hidden: Tensor) -> Tensor:
    parts, layout = own
    for part in parts:
        prompt = part().to(hidden).expand(hidden.shape[0], -1, -1)
        hidden = inserted(hidden, prompt, part.after_first, -2)
    return layout.padded(hidden, -2)


def inserted(tensor: Tensor, rows: Tensor, after_first: bool, dim: int) -> Tensor:
    """A tensor with others before or behind its first position."""
    if not after_first:
        return torch.cat([rows, tensor], dim=dim)
    first, rest = torch.split(tensor, [1, tensor.shape[dim] - 1], dim=dim)
    return torch.cat([first, rows, rest], dim=dim)


# --- masks ----------------------------------------------------------------------------------------


def flat(mask: Any) -> Tensor:
    """A mask ``(batch, sequence)``.

    Raises:
        UnsupportedError: If it has another form, as transformers makes it for static caches.
    """
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    raise UnsupportedError(
        "Prompt tuning needs an attention mask of (batch, sequence). Masks by query, which "
        "generation with a static cache makes too, say nothing about the prompt; use a dynamic "
        "cache."
    )


def inner_mask(op: PromptOp, mask: Tensor, hidden: Tensor) -> Tensor:
    """A mask that lacks the prompt, with it; no position of the prompt sees padding.

    Args:
        op: What the site does.
        mask: ``(batch, keys)`` or ``(batch, 1, queries, keys)``, equal for all queries.
        hidden: Hidden states with the prompt.
    """
    short = hidden.shape[1] - op.length
    if mask.dim() == 2:
        return op.mask(mask) if mask.shape[1] == short else mask
    if op.ragged:
        mask = mask.expand(hidden.shape[0], *mask.shape[1:])
    if mask.shape[-1] == short:
        additive = mask.is_floating_point()
        unseen = torch.finfo(mask.dtype).min if additive else 0
        mask = op.insert(mask, _visible(0 if additive else 1), -1, unseen)
    if mask.shape[-2] == short:
        mask = op.insert(mask, repeated(-2), -2)
    return mask


def _visible(value: int) -> Like:
    return lambda mask, length: mask.new_full((*mask.shape[:-1], length), value)


def repeated(dim: int) -> Like:
    """What stands at the first position, as often as there are positions."""

    def repeat(tensor: Tensor, length: int) -> Tensor:
        shape = list(tensor.shape)
        shape[dim] = length
        return tensor.narrow(dim, 0, 1).expand(shape)

    return repeat
