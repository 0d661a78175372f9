"""Blocks at a site: parts that are made of the parts of several branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexheads.composition import Average, Block, Fuse, Split
from flexheads.errors import CompositionError
from flexheads.sites.base import AttachedSite
from flexheads.sites.fused import Branch, Fused
from flexheads.sites.residual import Stream

_CHANGED = {"linear": 1, "norm": 1, "tokens": 1, "hidden": 0, "embedding": 0}
"""By kind of site, the argument of a part that its result takes the place of."""


def combine(site: AttachedSite, block: Block, branches: Sequence[Branch], fusion: Any) -> Any:
    """A part that stands for a block of branches in the middle of a chain.

    Args:
        site: Where.
        block: A Fuse, Average or Split.
        branches: The parts of each branch here, in order; not all are empty.
        fusion: The part of the block's AdapterFusion here, or None.

    Raises:
        CompositionError: If the block has no meaning for these parts.
    """
    parts = [part for branch in branches for part in branch]
    if isinstance(block, Fuse):
        if site.kind != "residual":
            raise CompositionError(
                f"{block!r}: AdapterFusion is about bottleneck adapters, but some of these act "
                f"at {site.address}. Use Average or Stack for them."
            )
        if fusion is None or not all(branches):
            raise CompositionError(
                f"{block!r}: the fused adapters do not all act at {site.address}. Fuse adapters "
                "that act at the same places."
            )
        return Fused(branches, fusion)
    if site.kind == "residual" and len({_replaces(branch) for branch in branches}) > 1:
        raise CompositionError(
            f"{block!r}: some of these adapters take the place of the layer's own norm at "
            f"{site.address} and others do not. Use adapters of one kind."
        )
    if isinstance(block, Average):
        if site.kind == "residual":
            return AveragedStream(branches, block.weights)
        if site.kind in _CHANGED and not any(getattr(p, "changes_input", False) for p in parts):
            return Combined(branches, _CHANGED[site.kind], weights=block.weights)
    if isinstance(block, Split):
        if site.kind == "residual":
            return SplitStream(branches, block.splits)
        if site.kind in ("linear", "norm") and not any(
            getattr(part, "changes_input", False) for part in parts
        ):
            return Combined(branches, _CHANGED[site.kind], splits=block.splits)
    raise CompositionError(
        f"{block!r} has no meaning for the {type(parts[0]).__name__} at {site.address}."
    )


class _StreamBlock:
    """What blocks of whole branches at a residual site have in common."""

    def __init__(self, branches: Sequence[Branch]) -> None:
        self.branches = branches
        parts = [part for branch in branches for part in branch]
        self.replaces_norm = _replaces(branches[-1])
        self.needs = frozenset({need for part in parts for need in part.needs})


class AveragedStream(_StreamBlock):
    """The weighted mean of the residual streams of several branches."""

    def __init__(self, branches: Sequence[Branch], weights: Sequence[float]) -> None:
        super().__init__(branches)
        self.weights = weights

    def __call__(self, stream: Stream) -> Stream:
        """Changes the residual stream."""
        streams = [run_stream(branch, stream) for branch in self.branches]
        return _put_together(streams, stream, lambda tensors: _mean(tensors, self.weights))


class SplitStream(_StreamBlock):
    """Consecutive positions of the sequence through one branch each."""

    def __init__(self, branches: Sequence[Branch], splits: Sequence[int]) -> None:
        super().__init__(branches)
        self.splits = splits

    def __call__(self, stream: Stream) -> Stream:
        """Changes the residual stream."""
        none = (None,) * len(self.splits)
        total, x, r = (none if t is None else cut_sequence(t, self.splits) for t in stream[:3])
        streams = [
            run_stream(branch, Stream(*own, stream.norm))
            for branch, own in zip(self.branches, zip(total, x, r, strict=True), strict=True)
        ]
        return _put_together(streams, stream, lambda tensors: torch.cat(list(tensors), dim=1))


class Combined(nn.Module):
    """Branches of parts that map tensors to one tensor, as a part of the same kind.

    Args:
        branches: The branches.
        changed: The argument that a part gives a new value: what the next part of a branch gets.
        weights: The weight of each branch's result, or None.
        splits: The positions of each branch, or None.
    """

    changes_input = False
    changes_output = True

    def __init__(
        self,
        branches: Sequence[Branch],
        changed: int,
        weights: Sequence[float] | None = None,
        splits: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.branches = tuple(tuple(branch) for branch in branches)  # in a tuple: not its own
        self.changed, self.weights, self.splits = changed, weights, splits

    def forward(self, *args: Any) -> Tensor:
        """Runs the branches and puts their results together."""
        if self.weights is not None:
            results = [self._run(branch, args) for branch in self.branches]
            return _mean(results, self.weights)
        assert self.splits is not None
        return torch.cat(
            [self._run(b, own) for b, own in zip(self.branches, self._cut(args), strict=True)],
            dim=1,
        )

    def inverse(self, hidden: Tensor) -> Tensor:
        """An average has no inverse that could be computed.

        Raises:
            CompositionError: Always.
        """
        raise CompositionError(
            "An Average of invertible adapters cannot be inverted before a language-model head."
        )

    def _run(self, branch: Branch, args: Sequence[Any]) -> Tensor:
        own = list(args)
        for part in branch:
            own[self.changed] = part(*own)
        result: Tensor = own[self.changed]
        return result

    def _cut(self, args: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        assert self.splits is not None
        columns = [
            cut_sequence(arg, self.splits) if isinstance(arg, Tensor) else (arg,) * len(self.splits)
            for arg in args
        ]
        return zip(*columns, strict=True)


def run_stream(branch: Branch, stream: Stream) -> Stream:
    """The stream behind the parts of a branch."""
    for part in branch:
        stream = part(stream)
    return stream


def _replaces(branch: Branch) -> bool:
    return bool(branch) and bool(branch[-1].replaces_norm)


def _put_together(
    streams: Sequence[Stream], whole: Stream, join: Callable[[Sequence[Tensor]], Tensor]
) -> Stream:
    """One stream from those of several branches, as far as all of them have its tensors."""
    totals = [s.total for s in streams if s.total is not None]
    xs = [s.x for s in streams if s.x is not None]
    return Stream(
        join(totals) if len(totals) == len(streams) else None,
        join(xs) if len(xs) == len(streams) else None,
        whole.r,
        whole.norm,
    )


def cut_sequence(tensor: Tensor, splits: Sequence[int]) -> tuple[Tensor, ...]:
    """Consecutive positions of ``(batch, sequence, ...)``.

    Raises:
        CompositionError: If the sequence does not have the positions that the setup names.
    """
    if tensor.shape[1] != sum(splits):
        raise CompositionError(
            f"Split shares out {sum(splits)} positions as {list(splits)}, but the sequence has "
            f"{tensor.shape[1]}."
        )
    return torch.split(tensor, list(splits), dim=1)


def _mean(tensors: Sequence[Any], weights: Sequence[float]) -> Tensor:
    mean: Tensor = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        mean = mean + tensor * weight
    return mean
