"""The output site: a module whose result an adapter replaces, such as a norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexheads.sites.base import AttachedSite, HostWeights, run_chains
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime


class OutputPart(nn.Module):
    """What an adapter has at an output site."""

    def forward(self, given: Tensor, output: Tensor) -> Tensor:
        """Changes a module's result.

        Args:
            given: What the module was given, ``(batch, sequence, hidden)``.
            output: Its result so far, ``(batch, sequence, hidden)``.

        Returns:
            The new result.
        """
        raise NotImplementedError


class OutputOp(NamedTuple):
    """What an output site does in one plan."""

    chains: tuple[tuple[OutputPart, ...], ...]
    rows: RowMap | None


class AttachedOutput(AttachedSite):
    """A module in a live model whose result adapters change; its parts are `OutputPart`.

    Args:
        kind: ``"norm"`` for a layer norm.

    Attributes:
        projection: The module's weight and bias, for merging.
    """

    def __init__(
        self,
        address: str,
        kind: str,
        layer: int | None,
        host: nn.Module,
        width: int,
        runtime: Runtime,
    ) -> None:
        super().__init__(address, kind, layer, host, width, runtime)
        self.kind = kind
        self.projection = HostWeights(host)

    def needed(self, part: OutputPart) -> frozenset[str]:
        return frozenset({"output"})

    def register(self, hook: str) -> RemovableHandle:
        return self.host.register_forward_hook(self._after, prepend=True)

    def op(self, chains: Sequence[Sequence[OutputPart]], rows: RowMap | None) -> OutputOp:
        return OutputOp(tuple(map(tuple, chains)), rows)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        op: OutputOp | None = self.planned()
        if op is None:
            return None
        given, own = self.unfolded(args[0]), self.unfolded(output)
        return self.folded_as(output, run_chains(op.chains, op.rows, _run, given, own))


def _run(parts: Sequence[OutputPart], given: Tensor, output: Tensor) -> Tensor:
    for part in parts:
        output = part(given, output)
    return output
