"""The linear site: a projection whose result an adapter changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexheads.sites.base import AttachedSite, run_chains
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime


class LinearPart(nn.Module):
    """What an adapter has at a linear site."""

    def forward(self, hidden: Tensor, output: Tensor) -> Tensor:
        """Changes a projection's result.

        Args:
            hidden: The projection's input, ``(batch, sequence, in_features)``.
            output: Its result so far, with that of earlier parts of the chain, ``(batch,
                sequence, out_features)``.

        Returns:
            The new result.
        """
        raise NotImplementedError


class LinearOp(NamedTuple):
    """What a linear site does in one plan."""

    chains: tuple[tuple[LinearPart, ...], ...]
    rows: RowMap | None


class AttachedLinear(AttachedSite):
    """A projection in a live model; its parts are `LinearPart`.

    Attributes:
        in_features, out_features: Widths of the projection's input and output.
    """

    kind = "linear"

    def __init__(
        self, address: str, role: str, layer: int | None, host: nn.Module, runtime: Runtime
    ) -> None:
        self.in_features, self.out_features = _widths(host)
        super().__init__(address, role, layer, host, self.out_features, runtime)

    def needed(self, part: LinearPart) -> frozenset[str]:
        return frozenset({"output"})

    def register(self, hook: str) -> RemovableHandle:
        return self.host.register_forward_hook(self._after, prepend=True)

    def op(self, chains: Sequence[Sequence[LinearPart]], rows: RowMap | None) -> LinearOp:
        return LinearOp(tuple(map(tuple, chains)), rows)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        op: LinearOp | None = self.planned()
        if op is None:
            return None
        return run_chains(op.chains, op.rows, _run, args[0], output)


def _widths(host: Any) -> tuple[int, int]:
    return int(host.in_features), int(host.out_features)


def _run(parts: Sequence[LinearPart], x: Tensor, output: Tensor) -> Tensor:
    for part in parts:
        output = part(x, output)
    return output
