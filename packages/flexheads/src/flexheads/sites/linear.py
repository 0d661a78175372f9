"""The linear site: a projection whose result an adapter changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexheads.sites.base import AttachedSite, run_chains
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime


class LinearOp(NamedTuple):
    """What a linear site does in one plan."""

    chains: tuple[tuple[nn.Module, ...], ...]
    rows: RowMap | None


class AttachedLinear(AttachedSite):
    """A projection in a live model; a part here is a module ``(input, output) -> output``.

    The input is ``(batch, sequence, in_features)``, the output ``(batch, sequence,
    out_features)`` with the projection's own result and that of earlier parts of the chain.

    Attributes:
        in_features, out_features: Widths of the projection's input and output.
    """

    kind = "linear"

    def __init__(
        self, address: str, role: str, layer: int | None, host: nn.Module, runtime: Runtime
    ) -> None:
        self.in_features, self.out_features = int(host.in_features), int(host.out_features)
        super().__init__(address, role, layer, host, self.out_features, runtime)

    def needed(self, part: nn.Module) -> frozenset[str]:
        return frozenset({"output"})

    def register(self, hook: str) -> RemovableHandle:
        return self.host.register_forward_hook(self._after, prepend=True)

    def op(self, chains: Sequence[Sequence[nn.Module]], rows: RowMap | None) -> LinearOp:
        return LinearOp(tuple(map(tuple, chains)), rows)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        op: LinearOp | None = self.planned()
        if op is None:
            return None
        return run_chains(op.chains, op.rows, _run, args[0], output)


def _run(parts: Sequence[nn.Module], x: Tensor, output: Tensor) -> Tensor:
    for part in parts:
        output = part(x, output)
    return output
