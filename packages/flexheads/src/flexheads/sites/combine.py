"""Blocks at a site: parts that are made of the parts of several branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexheads.composition import Average, Block, Fuse, Split
from flexheads.errors import CompositionError
from flexheads.sites.attention import AttentionPart, join_prefixes
from flexheads.sites.base import AttachedSite
from flexheads.sites.fused import Branch, Fused
from flexheads.sites.prompts import PromptPart
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
    reason = _reason_against(site, block, branches, fusion)
    if reason is not None:
        raise CompositionError(f"{block!r} at {site.address}: {reason}")
    if isinstance(block, Fuse):
        return Fused(branches, fusion)
    weights: Any = getattr(block, "weights", None)
    splits: Any = getattr(block, "splits", None)
    if site.kind == "attention":
        return AveragedPrefix(branches, weights)
    if site.kind == "prompt":
        return AveragedPrompt(branches, weights)
    if site.kind == "residual" and isinstance(block, Split):
        return SplitStream(branches, block.splits)
    if site.kind == "residual":
        return AveragedStream(branches, weights)
    whole = site.kind == "hidden"  # the first and last tokens are those of the whole sequence
    return Combined(branches, _CHANGED[site.kind], weights, splits, whole)


def _reason_against(
    site: AttachedSite, block: Block, branches: Sequence[Branch], fusion: Any
) -> str | None:
    """Why a block has no meaning for parts of these branches; None where it has one."""
    if isinstance(block, Fuse):
        if site.kind != "residual":
            return "AdapterFusion is about bottleneck adapters; use Average or Stack for others."
        if fusion is None or not all(branches):
            return "not all of the fused adapters act here; fuse those that act at the same places."
        return None
    entering = any(map(_enters, branches)) and _only_enter(branches)
    if entering and isinstance(block, Average) and abs(sum(block.weights) - 1) > 1e-6:
        return "these adapters change what the projection is given; weights must sum to one."
    if site.kind == "residual" and len({_replaces(branch) for branch in branches}) > 1:
        return "some of these take the place of the layer's norm and others do not; use one kind."
    if site.kind not in ("attention", "prompt"):
        return None
    if isinstance(block, Split):
        return "every position of the sequence sees a prefix or prompt, so none is its own."
    (_, where), *others = {_places(branch) for branch in branches}
    if others or len(where) > 1:
        return (
            "a mean needs a prefix or prompt of the same length in every branch, in the same place."
        )
    return None


def _places(branch: Branch) -> tuple[int, frozenset[bool]]:
    """How many positions a branch adds, and whether they stand behind the first one."""
    where = frozenset(bool(getattr(part, "after_first", False)) for part in branch)
    return sum(part.length for part in branch), where


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
        whole: Whether each branch looks at the whole sequence, of whose result it gives its
            positions.
    """

    changes_output = True

    def __init__(
        self,
        branches: Sequence[Branch],
        changed: int,
        weights: Sequence[float] | None,
        splits: Sequence[int] | None,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.branches = tuple(tuple(branch) for branch in branches)  # in a tuple: not its own
        self.changed, self.weights, self.splits, self.whole = changed, weights, splits, whole
        entering = any(map(_enters, self.branches))
        self.changes_input = entering and _only_enter(self.branches)
        # Parts that change both what a projection is given and its result run it for themselves.
        self.wants_own_result = entering and not self.changes_input

    def forward(self, *args: Any) -> Tensor:
        """Runs the branches and puts their results together."""
        return self._each(self._run, args)

    def enter(self, hidden: Tensor) -> Tensor:
        """Changes what a projection is given; see `flexheads.sites.linear.LinearPart`."""
        return self._each(_enter, (hidden,)) if self.changes_input else hidden

    def inverse(self, hidden: Tensor) -> Tensor:
        """Undoes the branches of a Split, each on its positions.

        Raises:
            CompositionError: If it is an average, which has no inverse that could be computed.
        """
        if self.splits is None:
            raise CompositionError(
                "An Average of invertible adapters cannot be inverted before a language-model head."
            )
        return self._each(_undo, (hidden,))

    def scores(self, hidden: Tensor, given: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        """The scores of tokens, as in `flexheads.sites.tokens.TokensPart`."""
        return self._each(partial(_score, weight), (hidden, given, logits))

    def _each(self, run: Callable[[Branch, Sequence[Any]], Tensor], args: Sequence[Any]) -> Tensor:
        """Something of every branch: the mean, or each for its positions."""
        if self.weights is not None:
            return _mean([run(branch, args) for branch in self.branches], self.weights)
        assert self.splits is not None
        if self.whole:
            found = [cut_sequence(run(branch, args), self.splits) for branch in self.branches]
            return torch.cat([own[place] for place, own in enumerate(found)], dim=1)
        cut = zip(self.branches, self._cut(args), strict=True)
        return torch.cat([run(branch, own) for branch, own in cut], dim=1)

    def _run(self, branch: Branch, args: Sequence[Any]) -> Tensor:
        own = list(args)
        if self.wants_own_result:
            own[0] = _enter(branch, args[:1])
            own[1] = args[2].run(own[0])
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


class AveragedPrefix(AttentionPart):
    """The weighted mean of the keys and values of several prefixes, which are of one length."""

    def __init__(self, branches: Sequence[Branch], weights: Sequence[float]) -> None:
        super().__init__()
        self.branches = tuple(tuple(branch) for branch in branches)  # in a tuple: not its own
        self.weights, self.length = weights, sum(part.length for part in branches[0])

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values before the attention's own."""
        keys, values = zip(*(join_prefixes(b, hidden) for b in self.branches), strict=True)
        return _mean(keys, self.weights), _mean(values, self.weights)


class AveragedPrompt(PromptPart):
    """The weighted mean of several prompts, which are of one length."""

    def __init__(self, branches: Sequence[Branch], weights: Sequence[float]) -> None:
        super().__init__()
        self.branches = tuple(tuple(branch) for branch in branches)  # in a tuple: not its own
        self.length, (self.after_first,) = _places(branches[0])
        self.weights = weights

    def forward(self) -> Tensor:
        """The prompt, ``(length, embedding size)``; in a branch the last adapter's is first."""
        own = (torch.cat([part() for part in reversed(branch)]) for branch in self.branches)
        return _mean(list(own), self.weights)


def _enters(branch: Branch) -> bool:
    """Whether a branch changes what a projection is given."""
    return any(getattr(part, "changes_input", False) for part in branch)


def _only_enter(branches: Sequence[Branch]) -> bool:
    """Whether all parts change what a projection is given, and nothing behind it."""
    parts = (part for branch in branches for part in branch)
    return all(part.changes_input and not part.changes_output for part in parts)


def _enter(branch: Branch, args: Sequence[Any]) -> Tensor:
    (hidden,) = args
    for part in branch:
        hidden = part.enter(hidden)
    found: Tensor = hidden
    return found


def _undo(branch: Branch, args: Sequence[Any]) -> Tensor:
    (hidden,) = args
    for part in reversed(branch):
        hidden = part.inverse(hidden)
    found: Tensor = hidden
    return found


def _score(weight: Tensor, branch: Branch, args: Sequence[Any]) -> Tensor:
    hidden, given, logits = args
    for part in branch:
        logits = part.scores(hidden, given, logits, weight)
    found: Tensor = logits
    return found


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
