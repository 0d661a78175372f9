"""The linear site: a projection whose input or result an adapter changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from flexheads.sites.base import AttachedSite, run_chains
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime
from flexheads.specs import FusedBlock


class Projection:
    """What adapters may know of a projection: its weight as ``(out, in)``, and its bias.

    Hides that transformers' ``Conv1D`` stores the transpose, and that a fused module computes
    several projections at once.

    Args:
        host: The module.
        block: The block of its output that is this projection; None is all of it.
    """

    def __init__(self, host: nn.Module, block: FusedBlock | None = None) -> None:
        self.host: Any = host
        self.transposed = isinstance(host, Conv1D)
        self.in_features, out_features = _widths(host)
        self.out_features = out_features if block is None else out_features // block.of
        start = 0 if block is None else block.index * self.out_features
        self.columns = None if block is None else slice(start, start + self.out_features)

    @property
    def weight(self) -> Tensor:
        """``(out_features, in_features)``; a view where that is possible."""
        weight: Tensor = self.host.weight
        weight = weight.t() if self.transposed else weight
        return weight if self.columns is None else weight[self.columns]

    @property
    def bias(self) -> Tensor | None:
        """``(out_features,)``, or None."""
        bias: Tensor | None = self.host.bias
        return bias if bias is None or self.columns is None else bias[self.columns]

    def of(self, output: Tensor) -> Tensor:
        """This projection's part of what the module computes."""
        return output if self.columns is None else output[..., self.columns]

    def into(self, output: Tensor, own: Tensor) -> Tensor:
        """What the module computes, with this projection's part replaced."""
        if self.columns is None:
            return own
        before, behind = output[..., : self.columns.start], output[..., self.columns.stop :]
        return torch.cat([before, own, behind], dim=-1)

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Replaces weight and bias."""
        self.weight.copy_(weight)
        if bias is not None and self.bias is not None:
            self.bias.copy_(bias)


class LinearPart(nn.Module):
    """What an adapter has at a linear site.

    Attributes:
        changes_input: Whether `enter` does something.
        changes_output: Whether `forward` does something.
    """

    changes_input = False
    changes_output = True

    def enter(self, hidden: Tensor) -> Tensor:
        """Changes what a projection is given: ``(batch, sequence, in_features)`` both ways."""
        return hidden

    def forward(self, hidden: Tensor, output: Tensor, projection: Projection) -> Tensor:
        """Changes a projection's result.

        Args:
            hidden: The projection's input, ``(batch, sequence, in_features)``.
            output: Its result so far, with that of earlier parts of the chain, ``(batch,
                sequence, out_features)``.
            projection: The projection, for methods that read its weight.

        Returns:
            The new result.
        """
        return output


class LinearOp(NamedTuple):
    """What a linear site does in one plan."""

    chains: tuple[tuple[LinearPart, ...], ...]
    rows: RowMap | None
    enters: bool
    """Whether some part changes the input."""


class AttachedLinear(AttachedSite):
    """A projection in a live model; its parts are `LinearPart`.

    Attributes:
        projection: The projection.
        in_features, out_features: Widths of its input and output.
    """

    kind = "linear"

    def __init__(
        self,
        address: str,
        role: str,
        layer: int | None,
        host: nn.Module,
        runtime: Runtime,
        block: FusedBlock | None = None,
    ) -> None:
        self.projection = Projection(host, block)
        self.in_features = self.projection.in_features
        self.out_features = self.projection.out_features
        super().__init__(address, role, layer, host, self.out_features, runtime)

    def needed(self, part: LinearPart) -> frozenset[str]:
        if not part.changes_input:
            return frozenset({"output"})
        if self.projection.columns is not None:
            return frozenset({"output"})  # the other projections keep their input
        return frozenset({"input", "output"} if part.changes_output else {"input"})

    def register(self, hook: str) -> RemovableHandle:
        if hook == "input":
            return self.host.register_forward_pre_hook(self._before)
        return self.host.register_forward_hook(self._after, prepend=True)

    def op(self, chains: Sequence[Sequence[LinearPart]], rows: RowMap | None) -> LinearOp:
        enters = any(part.changes_input for chain in chains for part in chain)
        return LinearOp(tuple(map(tuple, chains)), rows, enters)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        op: LinearOp | None = self.planned()
        if op is None or not op.enters:
            return None
        return (run_chains(op.chains, op.rows, _enter, args[0]), *args[1:])

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        op: LinearOp | None = self.planned()
        if op is None:
            return None
        hidden, own = args[0], self.projection.of(output)
        if op.enters and self.projection.columns is not None:
            hidden = run_chains(op.chains, op.rows, _enter, hidden)
            own = functional.linear(hidden, self.projection.weight, self.projection.bias)
        own = run_chains(op.chains, op.rows, self._run, hidden, own)
        return self.projection.into(output, own)

    def _run(self, parts: Sequence[LinearPart], hidden: Tensor, output: Tensor) -> Tensor:
        for part in parts:
            output = part(hidden, output, self.projection)
        return output


def _widths(host: Any) -> tuple[int, int]:
    if isinstance(host, Conv1D):
        return int(host.nx), int(host.nf)
    return int(host.in_features), int(host.out_features)


def _enter(parts: Sequence[LinearPart], hidden: Tensor) -> Tensor:
    for part in parts:
        hidden = part.enter(hidden)
    return hidden
