"""The hidden site: what a layer hands to the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flexheads.sites.base import AttachedSite, first_tensor, run_chains
from flexheads.sites.rows import RowMap
from flexheads.sites.runtime import Runtime
from flexheads.specs import Side


class HiddenPart(nn.Module):
    """What an adapter has at a hidden site."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Changes a layer's result, ``(batch, sequence, hidden)``."""
        raise NotImplementedError


class HiddenOp(NamedTuple):
    """What a hidden site does in one plan."""

    chains: tuple[tuple[HiddenPart, ...], ...]
    rows: RowMap | None


class AttachedHidden(AttachedSite):
    """The result of one layer in a live model; its parts are `HiddenPart`."""

    kind = "hidden"

    def __init__(
        self,
        address: str,
        role: str,
        layer: int,
        host: nn.Module,
        width: int,
        runtime: Runtime,
        *,
        side: Side | None,
    ) -> None:
        super().__init__(address, role, layer, host, width, runtime)
        self.side = side

    def needed(self, part: HiddenPart) -> frozenset[str]:
        return frozenset({"output"})

    def register(self, hook: str) -> RemovableHandle:
        return self.host.register_forward_hook(self._after, prepend=True)

    def op(self, chains: Sequence[Sequence[HiddenPart]], rows: RowMap | None) -> HiddenOp:
        return HiddenOp(tuple(map(tuple, chains)), rows)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        op: HiddenOp | None = self.planned()
        if op is None:
            return None
        hidden = run_chains(op.chains, op.rows, _run, first_tensor(output))
        return (hidden, *output[1:]) if isinstance(output, (tuple, list)) else hidden


def _run(parts: Sequence[HiddenPart], hidden: Tensor) -> Tensor:
    for part in parts:
        hidden = part(hidden)
    return hidden
